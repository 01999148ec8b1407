"""PyTorch as a row of ``mgq bench --train``: found in this Python or in another, run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mgq.errors import InputError, MgqError, no_such_path, printable

PROGRAM = Path(__file__).with_name("torch_steps.py")
PROBE = "import torch; print(torch.__version__)"
PROBE_PATIENCE_S = 120


def torch_python(given: Path | None) -> str:
    """The Python that runs PyTorch: the ``given`` one, else this one. Raises InputError where it has no PyTorch."""
    if given is None:
        if find_spec("torch") is None:
            raise InputError(
                "PyTorch is not installed in this Python: install it (pip install torch), or name a Python that has it "
                "by --torch-python"
            )
        return sys.executable
    try:
        probe = subprocess.run(
            [given, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_PATIENCE_S, check=False
        )
    except FileNotFoundError:
        raise no_such_path(f"--torch-python {given}") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else printable(error)
        raise InputError(f"--torch-python {printable(given)} does not run ({why}): name a Python") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"--torch-python {printable(given)} says nothing: name a Python that has PyTorch") from None
    if probe.returncode:
        raise InputError(f"--torch-python {printable(given)} has no PyTorch: install it there (pip install torch)")
    return str(given)


class TorchProcess:
    """Steps in PyTorch; it runs on the cores that this process may run on. Raises an MgqError where it cannot."""

    def __init__(self, python: str, order: Mapping[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        answer = self.ask(json.dumps(order))
        if "problem" in answer:
            self.close()
            raise MgqError(answer["problem"])
        self.version: str = answer["version"]

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self.close()
            raise MgqError(f"PyTorch ended with exit code {self.process.returncode}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def steps(self, number: int) -> tuple[tuple[int, ...], int]:
        """Run ``number`` steps: the time of each, and the processor time of all, in nanoseconds."""
        answer = self.ask(str(number))
        return tuple(answer["times"]), int(answer["processor"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
