"""A file that an engine refuses: the line says whether the engine's version is why, and what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgq.runtime import onnxruntime as room
from mgq.runtime.onnxruntime import OnnxRuntime
from mgq.runtime.protocol import cannot_run
from tests.conftest import one_line_about


@pytest.mark.parametrize(
    ("name", "version", "mend"),
    [
        ("ONNX Runtime", "1.9.0", "older than 1.20, the oldest that is tested: pip install 'onnxruntime>=1.20'"),
        ("ONNX Runtime", "1.20.1", "pass another --engine"),
        ("ONNX Runtime", "1.32.0", "pass another --engine"),
        ("ONNX Runtime", "2.0.0.dev1", "newer than 1.32, the newest that is tested: pip install 'onnxruntime==1.32.*'"),
        ("OpenVINO", "2024.6.0-17404-4c0f47d2335", "older than 2025.4"),
        ("OpenVINO", "2027.1.0", "newer than 2026.4"),
        ("MegEngine Lite", "1.13.4", "pass another --engine"),
    ],
)
def test_a_refused_file_says_whether_the_version_may_be_why(name: str, version: str, mend: str) -> None:
    runtime: Any = SimpleNamespace(name=name, version=version)
    said = str(cannot_run(runtime, Path("net.onnx"), RuntimeError("opset 99 is unknown\nat line 3")))
    assert one_line_about(said, name, version, "net.onnx", "opset 99 is unknown", mend), said


def test_an_engine_too_old_for_a_file_is_named_with_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unsupported model IR version: 10, max supported IR version: 7")

    old = SimpleNamespace(
        __version__="1.9.0",
        InferenceSession=refuse,
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda *_: None),
        ExecutionMode=SimpleNamespace(ORT_SEQUENTIAL=0),
        GraphOptimizationLevel=SimpleNamespace(ORT_ENABLE_ALL=99),
    )
    monkeypatch.setattr(room, "import_package", lambda _: old)
    monkeypatch.setattr(room, "read_onnx", lambda _: SimpleNamespace(quantized=True, content=b""))
    with pytest.raises(
        Exception, match=r"ONNX Runtime 1\.9\.0 cannot run .*max supported IR.*pip install 'onnxruntime>=1\.20'"
    ):
        OnnxRuntime(tmp_path / "net.onnx")
