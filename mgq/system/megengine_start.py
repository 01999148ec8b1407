"""Starts MegEngine for the ``mgq`` command: quickly, and without what its libraries say."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

from mgq.machine import (
    hush_decoders,
    keep_freed_memory,
    load_megengine,
    mute_stderr,
    refuse_without_megengine,
)
from mgq.system.end_signals import END_REQUEST

NEVER = 1 << 60
"""Bytes that no tensor has."""


def import_megengine() -> None:
    """Import MegEngine for a process of mgq's own: quickly, and as :func:`load_megengine` does.

    Raises InputError, which says what to run instead, where it is not installed.
    """
    refuse_without_megengine()
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")
    # It opens files through clients of four cloud services, half of the import: here all files are local.
    sys.modules.setdefault("megfile", LocalFiles("megfile"))
    # It asks whether its in-house twin is installed beside it, which takes a third of a second to find out.
    sys.modules.setdefault("pkg_resources", NoPackages("pkg_resources"))
    load_megengine()
    with mute_stderr():
        import megengine

        # MegEngine lists large tensors that it could drop and compute again, even while it is not to drop any. Two of
        # its threads change the list, one without a lock: now and then a run ended in "got wrong candidate index".
        megengine.dtr.evictee_minimum_size = NEVER
    END_REQUEST.obey()


def prepare_process() -> None:
    """What a process that helps needs before its work: what this one has."""
    hush_decoders()
    import_megengine()


def prepare_long_process() -> None:
    """The same for one that is to compute for long."""
    keep_freed_memory()  # before MegEngine starts its threads
    prepare_process()


class NoPackages(ModuleType):
    """Stands for ``pkg_resources`` where nothing but a look through the installed packages is wanted of it."""

    working_set = ()


class LocalFiles(ModuleType):
    """Stands for the module ``megfile``, of which mgq uses nothing but ``smart_open`` for local files."""

    smart_open = staticmethod(open)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def raise_error(*_: object, **__: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is not available in the mgq command")

        return raise_error
