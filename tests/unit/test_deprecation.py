"""Names that were public before: they still work, and say what they are called now."""

from __future__ import annotations

import importlib

import pytest

import mgq
from mgq.data.decoding import bundled_cat
from mgq.engine.classifier.predict import ClassScore, Prediction

OLD_NAMES = {
    "mgq.events": ("Watcher", "ALONE", "OnRemark", "silent", "unheard"),
    "mgq.engine.classifier.predict": ("Answer", "Guess"),
    "mgq.engine.training.training_run": ("Outcome",),
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in OLD_NAMES.items() for n in names])
def test_an_old_name_is_the_new_one_with_a_warning(module: str, name: str) -> None:
    where = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now called"):
        assert getattr(where, name) is not None


def test_a_name_that_never_was_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="Onlooker"):
        importlib.import_module("mgq.events").Onlooker  # noqa: B018


def test_old_fields_of_an_answer_give_the_new_ones() -> None:
    made = Prediction("cat.jpg", (ClassScore(1, "cat", 0.5),))
    with pytest.warns(DeprecationWarning, match="image"):
        assert made.picture == "cat.jpg"
    with pytest.warns(DeprecationWarning, match="scores"):
        assert made.guesses == made.scores


def test_old_keywords_are_taken_and_warned_of(short_shufflenet: None) -> None:
    with pytest.warns(DeprecationWarning, match="images="):
        found = mgq.infer(pictures=[bundled_cat()], arch="efficientnet_lite0")  # type: ignore[call-arg]
    assert found[0].error is None
    for call in (mgq.train, mgq.qat):
        with pytest.warns(DeprecationWarning, match="callbacks="), pytest.raises(mgq.InputError):
            call(watcher=None, arch="no such network")


def test_new_names_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    for module, names in OLD_NAMES.items():
        assert not set(names) & set(vars(importlib.import_module(module)))
    assert not [found for found in recwarn if found.category is DeprecationWarning and "mgq" in str(found.message)]
