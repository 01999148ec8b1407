"""Options that could have no effect beside the others are refused by one table a command."""

from __future__ import annotations

import pytest

from mgq.cli.main import verbs
from mgq.cli.option_needs import list_needs


@pytest.mark.parametrize("verb", verbs())
def test_needs_name_options_that_the_verb_has(verb: str) -> None:
    command = verbs()[verb]
    kind = getattr(command.callback, "__wrapped__", command.callback)
    if not isinstance(kind, type):
        assert verb == "doctor"  # a function, whose options all have an effect
        return
    known = {parameter.name for parameter in command.params}
    needs = list(list_needs(kind))
    assert needs and all(set(need.options) <= known for need in needs)


def test_a_command_that_is_called_from_python_has_no_options_that_were_typed() -> None:
    from mgq.cli.infer import InferCommand
    from mgq.cli.option_needs import refuse_idle_options

    refuse_idle_options(InferCommand(rgb=True))
