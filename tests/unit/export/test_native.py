"""The native engine: to the bit as the integers in numpy, on every family, kernel, size and layout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import megengine
import numpy as np
import numpy.typing as npt
import onnx
import pytest

from mgq.errors import FailureError, InputError
from mgq.export.native import cache as cache_module
from mgq.export.native.cache import Entry
from mgq.export.native.compiler import CompiledProgram, compile_program, object_of
from mgq.export.native.cpu import Level, get_level
from mgq.export.native.emit.driver import emit_module
from mgq.export.native.library import Library
from mgq.export.native.linker import write_library
from mgq.export.native.planner import Plan, make_plan
from mgq.export.native.program import Conv, Program, read_program
from mgq.export.native.reference import integers_of, run_reference
from mgq.export.onnx.onnx_file import parse_onnx
from mgq.export.onnx.writer import model_of, plain_graph
from mgq.machine import usable_cores
from mgq.ptq.presets import PLAIN
from mgq.quantization.float_layers import keep_in_float
from mgq.quantization.targets import MEGENGINE, ONNX
from mgq.runtime import native
from mgq.runtime.library import LibraryRuntime
from mgq.runtime.native import NativeRuntime, compile_file
from mgq.runtime.registry import choose_backend
from mgq.zoo.registry import spec_of
from tests.conftest import slow
from tests.fakes.measured_ranges import simulate
from tests.fakes.native_programs import BEST, HERE, PORTABLE, Images, model_for, noise, program_for
from tests.fakes.places import ROOT

FAMILIES = (slow("resnet18"), slow("resnet50"), "shufflenet_v1_x1_5_g3", "mobilenet_v2", slow("efficientnet_lite0"))


def differing(program: Program, level: Level, images: Images) -> dict[str, int]:
    """How many integers of each tensor that is in memory differ from the reference; logits too."""
    plan: Plan = make_plan(program, keep=True, unit=level.isa().unit)
    module = emit_module(plan, level.isa(), "nounwind")
    library = Library(CompiledProgram(object_of(module.text, level), module.constants, module.work), program.classes)
    found: dict[str, int] = {}
    for image in images:
        library.memory[:] = 77
        logits, values = run_reference(program, image[None])
        found["logits"] = found.get("logits", 0) + int((library.run(image[None]) != logits).sum())
        for name, storage in plan.storages.items():
            if name in values and name != program.input:
                got = storage.read(library.memory, plan.lanes[name])
                found[name] = found.get(name, 0) + int((got != values[name][0]).sum())
    return found


def logits_in(program: Program, level: Level, images: Images) -> npt.NDArray[np.float32]:
    return Library(compile_program(program, level), program.classes).run(images)


@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_layer_of_every_kernel_is_the_reference_to_the_bit(arch: str, level: Level) -> None:
    found = differing(program_for(arch), level, noise(64, 2, 5))
    assert len(found) > 20
    assert not any(found.values()), {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("size", (slow(32), slow(96), slow(160), 224))
def test_layers_run_row_by_row_give_the_same_bits_at_every_size(arch: str, size: int) -> None:
    program = program_for(arch, size)
    images = noise(size, 1, size)
    assert np.array_equal(logits_in(program, BEST, images), run_reference(program, images)[0])


def wide_program(arch: str, height: int, width: int) -> Program:
    """Of pictures that are no squares."""
    model = onnx.ModelProto()
    model.CopyFrom(model_for(arch, 64))
    axes = model.graph.input[0].type.tensor_type.shape.dim
    axes[2].dim_value, axes[3].dim_value = height, width
    return read_program(model)


@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
@pytest.mark.parametrize(("arch", "height", "width"), [("mobilenet_v2", 64, 160), slow("resnet18", 96, 64)])
def test_pictures_that_are_no_squares_give_the_same_bits(arch: str, height: int, width: int, level: Level) -> None:
    program = wide_program(arch, height, width)
    images = np.random.default_rng(3).integers(0, 256, (2, 3, height, width), np.uint8)
    assert not any(differing(program, level, images).values())
    assert np.array_equal(logits_in(program, level, images), run_reference(program, images)[0])


def test_a_shared_library_of_pictures_that_are_no_squares_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a library of pictures that are no squares: pass --engine native"):
        write_library(wide_program("mobilenet_v2", 64, 96), tmp_path / "net.so", BEST, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
def test_rows_that_fill_no_vector_are_right(level: Level) -> None:
    program = program_for("mobilenet_v2", 224)
    images = noise(224, 1, 8)
    assert np.array_equal(logits_in(program, level, images), run_reference(program, images)[0])


@pytest.mark.parametrize(
    "arch",
    (
        "shufflenet_v1_x0_5_g3",
        slow("shufflenet_v1_x1_0_g3"),
        slow("shufflenet_v1_x2_0_g3"),
        slow("shufflenet_v1_x1_5_g8"),
        slow("resnet34"),
    ),
)
def test_groups_of_any_number_and_width_give_the_same_bits(arch: str) -> None:
    try:
        spec_of(arch)
    except InputError:
        pytest.skip(f"the zoo has no {arch}")
    program = program_for(arch)
    for level in (BEST, PORTABLE):
        images = noise(64, 1, 4)
        assert np.array_equal(logits_in(program, level, images), run_reference(program, images)[0])


@pytest.mark.parametrize("classes", (slow(2), 17, slow(1000)))
def test_any_number_of_classes(classes: int) -> None:
    program = program_for("mobilenet_v2", 32, classes)
    images = noise(32, 1)
    found = logits_in(program, BEST, images)
    assert found.shape == (1, classes)
    assert np.array_equal(found, run_reference(program, images)[0])


def test_grids_that_end_at_127_are_limited_as_in_the_file() -> None:
    model = model_for("resnet18", 64, MEGENGINE)
    program = read_program(model)
    assert {tensor.high for tensor in program.tensors.values()} >= {127}
    for level in HERE:
        assert not any(differing(program, level, noise(64)).values())


def test_sums_that_int32_cannot_hold_are_saturated() -> None:
    """A multiplier so large that scaled sums are beyond int32."""
    program = program_for("resnet18")
    large = [
        Conv(**{**layer.__dict__, "multiplier": layer.multiplier * np.float32(2**20)})
        if isinstance(layer, Conv) and i == 3
        else layer
        for i, layer in enumerate(program.layers)
    ]
    changed = Program(tuple(large), program.tensors, program.input, program.output, program.classes)
    for level in HERE:
        assert not any(differing(changed, level, noise(64)).values()), level.key


@pytest.mark.parametrize("arch", FAMILIES)
def test_each_layer_is_that_of_onnx_runtime_but_for_single_steps(arch: str) -> None:
    """Given the integers that ONNX Runtime has in front of it, without optimizations: at most one value in 100,000."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = onnx.ModelProto()
    model.CopyFrom(model_for(arch, 64))
    program = read_program(model)
    names = [layer.output for layer in program.layers[:-1]]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    images = noise(64, 2, 6)
    _, *shown = runtime.InferenceSession(model.SerializeToString(), options).run(None, {"data": images})
    tensors = program.tensors
    values = {
        name: np.clip(read, tensors[name].low, tensors[name].high) for name, read in zip(names, shown, strict=True)
    }
    values[program.input] = images
    steps = [
        np.abs(integers_of(program, layer, values).astype(int) - values[layer.output]) for layer in program.layers[:-1]
    ]
    assert max(int(one.max()) for one in steps) <= 1
    assert sum(int((one > 0).sum()) for one in steps) <= 1e-5 * sum(one.size for one in steps)


@pytest.mark.parametrize("threads", (1, 2))
def test_batches_answer_as_single_images(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "network.onnx"
    onnx.save(model_for("mobilenet_v2", 64), str(path))
    runtime = NativeRuntime(path, min(threads, usable_cores()))
    images = noise(64, 5)
    together = runtime.run(images)
    assert np.array_equal(together, np.concatenate([runtime.run(image[None]) for image in images]))


# Threads


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("size", (32, 224))
def test_any_number_of_threads_gives_the_same_bits(arch: str, size: int) -> None:
    """More threads than rows, or than cores, too: 5 images are some for each thread, and some for all together."""
    compiled, classes = compile_program(program_for(arch, size), BEST), 1000
    images = noise(size, 5, 2)
    wanted = Library(compiled, classes).run(images)
    for threads in (2, 3, 17):
        team = Library(compiled, classes, threads)
        for count in (5, 1):
            assert np.array_equal(team.run(images[:count]), wanted[:count]), (threads, count)


def test_a_network_is_run_by_several_threads_of_python_at_a_time() -> None:
    library = Library(compile_program(program_for("mobilenet_v2", 32), BEST), 1000, 2)
    images = noise(32, 40, 3)
    wanted = [library.run(image[None]) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(library.run, (image[None] for image in images)))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_threads_sleep_between_two_runs_and_end_with_the_network() -> None:
    library = Library(compile_program(program_for("mobilenet_v2", 32), BEST), 1000, 3)
    before = {thread.native_id for thread in threading.enumerate()}
    library.run(noise(32))
    helpers = [thread for thread in threading.enumerate() if thread.daemon and thread.native_id in before][-2:]

    def states() -> set[str]:
        return {Path(f"/proc/self/task/{helper.native_id}/stat").read_text().split()[2] for helper in helpers}

    assert any(states() == {"S"} for _ in waiting())
    del library
    assert any(not helper.is_alive() for helper in helpers for _ in waiting())
    assert not any(helper.is_alive() for helper in helpers)


def waiting() -> Iterator[None]:
    for _ in range(200):
        yield
        time.sleep(0.01)


def test_a_forked_process_has_threads_of_its_own() -> None:
    library = Library(compile_program(program_for("mobilenet_v2", 32), BEST), 1000, 2)
    image = noise(32)
    wanted = library.run(image)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(library.run(image), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(library.run(image), wanted)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled networks are cached; that of ``file`` has been compiled before."""
    monkeypatch.setenv("MGQ_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "compile_file", lambda *_: entry_of_the_file())
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    path.write_bytes(content_of_the_file())
    return path


@cache
def content_of_the_file() -> bytes:
    content: bytes = model_for("mobilenet_v2", 32).SerializeToString()
    return content


@cache
def entry_of_the_file() -> Entry:
    return compile_file(parse_onnx(Path("network.onnx"), content_of_the_file()), BEST)


def test_the_second_start_compiles_nothing(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = NativeRuntime(file).run(noise(32))
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o022 == 0
    monkeypatch.setattr(native, "compile_file", lambda *_: pytest.fail("compiled again"))
    assert np.array_equal(NativeRuntime(file).run(noise(32)), wanted)


@pytest.mark.parametrize("place", (0, 20, *range(78, 150, 4), -1))
def test_a_damaged_entry_is_made_again(folder: Path, file: Path, place: int) -> None:
    wanted = NativeRuntime(file).run(noise(32))
    (entry,) = folder.iterdir()
    content = bytearray(entry.read_bytes())
    content[place] ^= 1
    entry.write_bytes(content)
    assert np.array_equal(NativeRuntime(file).run(noise(32)), wanted)
    assert entry.read_bytes() != bytes(content)


def test_an_entry_cut_short_is_made_again(folder: Path, file: Path) -> None:
    wanted = NativeRuntime(file).run(noise(32))
    (entry,) = folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:1000])
    assert np.array_equal(NativeRuntime(file).run(noise(32)), wanted)


def test_code_that_others_could_have_written_is_not_run(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    NativeRuntime(file)
    folder.chmod(0o777)
    made: list[int] = []
    genuine = native.compile_file

    def counted(*args: Any) -> Any:
        made.append(1)
        return genuine(*args)

    monkeypatch.setattr(native, "compile_file", counted)
    NativeRuntime(file)
    folder.chmod(0o700)
    (entry,) = folder.iterdir()
    entry.chmod(0o666)
    NativeRuntime(file)
    assert len(made) == 2


def test_the_entries_that_were_used_last_are_kept(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "KEPT", 2)
    folder.mkdir(mode=0o700)
    for age, name in enumerate(("old", "older", "oldest")):
        (folder / f"{name}.native").write_bytes(b"")
        os.utime(folder / f"{name}.native", (1000 - age, 1000 - age))
    NativeRuntime(file)
    names = {path.stem for path in folder.iterdir()}
    assert len(names) == 2 and "old" in names


def test_a_cache_of_another_user_is_not_used(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NativeRuntime(file)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    (entry,) = folder.iterdir()
    before = entry.stat().st_mtime_ns
    NativeRuntime(file).run(noise(32))
    assert entry.stat().st_mtime_ns == before


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize(("owner", "mode"), [(0, 0o755), (0, 0o777), (NOBODY, 0o500)])
def test_another_user_neither_runs_nor_changes_what_is_not_its_own(
    file: Path, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        shared, cache = Path(place), Path(place, "cache")
        shared.chmod(0o755)
        network = Path(shutil.copy(file, shared))
        monkeypatch.setenv("MGQ_NATIVE_CACHE", str(cache))
        wanted = NativeRuntime(network).run(noise(32))
        if owner:
            (entry,) = cache.iterdir()
            entry.unlink()
        os.chown(cache, owner, owner)
        cache.chmod(mode)
        before = {entry: entry.stat().st_mtime_ns for entry in cache.iterdir()}
        made: list[int] = []
        genuine = native.compile_file

        def counted(*given: Any) -> Any:
            made.append(1)
            return genuine(*given)

        monkeypatch.setattr(native, "compile_file", counted)
        child = os.fork()
        if not child:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os._exit(0 if np.array_equal(NativeRuntime(network).run(noise(32)), wanted) and made else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert {entry: entry.stat().st_mtime_ns for entry in cache.iterdir()} == before


def test_without_a_place_for_the_cache_it_still_runs(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("MGQ_NATIVE_CACHE", str(blocked / "cache"))
    assert NativeRuntime(file).run(noise(32)).shape == (1, 1000)


def test_a_float_file_is_refused_in_one_line(tmp_path: Path) -> None:
    network = spec_of("resnet18").build()
    network.eval()
    path = tmp_path / "float.onnx"
    onnx.save(model_of(plain_graph(network, 32), 32, 1, {}), str(path))
    with pytest.raises(InputError, match="--engine openvino"):
        NativeRuntime(path)


def test_layers_kept_in_float_are_refused_in_one_line_that_names_openvino_and_go_there(tmp_path: Path) -> None:
    megengine.random.seed(3)
    network = spec_of("resnet18").build(10)
    network.eval()
    fake = simulate(network, noise(32), PLAIN, ONNX)
    keep_in_float(fake, ["layer2.0.conv_bn_relu1"])
    path = tmp_path / "mixed.onnx"
    onnx.save(model_of(plain_graph(fake, 32), 32, 1, {}), str(path))
    with pytest.raises(
        InputError, match=r"in float: pass --engine openvino, or .* OpenVINO or ONNX Runtime$"
    ) as refused:
        NativeRuntime(path)
    assert "\n" not in str(refused.value)
    assert choose_backend(path).key == "openvino"


def test_images_of_another_shape_are_refused(file: Path) -> None:
    with pytest.raises(InputError, match="32"):
        NativeRuntime(file).run(noise(64))


# Shared libraries


@cache
def has_compiler() -> bool:
    return shutil.which("cc") is not None


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
def test_a_shared_library_gives_the_bits_of_the_reference(tmp_path: Path, level: Level) -> None:
    program = program_for("mobilenet_v2", 32)
    made = write_library(program, tmp_path / "net.so", level, {"arch": "mobilenet_v2"})
    runtime = LibraryRuntime(made.path, 2)
    images = noise(32, 3)
    assert np.array_equal(runtime.run(images), run_reference(program, images)[0])
    assert (runtime.takes, runtime.classes, runtime.version) == ((None, 3, 32, 32), 1000, level.key)
    assert runtime.about["arch"] == "mobilenet_v2"


def example(number: int = 0) -> str:
    """A C program of the documents."""
    text = (ROOT / "docs" / "guides" / "native-library.md").read_text(encoding="utf-8")
    return text.split("```c\n")[number + 1].partition("```")[0]


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_the_program_in_c_of_the_documents_gives_the_same_bits(tmp_path: Path) -> None:
    program = program_for("mobilenet_v2", 32)
    names = [f"class {number}" for number in range(1000)]
    write_library(program, tmp_path / "network.so", BEST, {"arch": "mobilenet_v2", "classes": names})
    (tmp_path / "main.c").write_text(example(), encoding="utf-8")
    command = ["cc", "-Wall", "-Werror", "-std=c99", "main.c", "./network.so", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    image = noise(32)
    done = subprocess.run(["./main"], cwd=tmp_path, input=image.tobytes(), check=True, capture_output=True)
    wanted = run_reference(program, image)[0][0]
    name, logit = done.stdout.decode().strip().rsplit(" ", 1)
    assert name == f"mobilenet_v2: class {wanted.argmax()}"
    assert np.float32(float.fromhex(logit)) == wanted.max()


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_two_threads_of_a_program_in_c_give_the_same_bits(tmp_path: Path) -> None:
    program = program_for("mobilenet_v2", 32)
    write_library(program, tmp_path / "network.so", BEST, {})
    (tmp_path / "main.c").write_text(example(1), encoding="utf-8")
    command = ["cc", "-Wall", "-Werror", "-std=c99", "-pthread", "main.c", "./network.so", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    images = noise(32, 9, 2)
    done = subprocess.run(["./main"], cwd=tmp_path, input=images.tobytes(), check=True, capture_output=True, timeout=60)
    answers = [line.rsplit(" ", 1) for line in done.stdout.decode().splitlines()]
    wanted = run_reference(program, images)[0]
    assert [np.float32(float.fromhex(logit)) for _, logit in answers] == list(wanted.max(axis=1))


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_a_shared_library_needs_libc_alone_and_is_small(tmp_path: Path) -> None:
    program = program_for("mobilenet_v2", 32)
    made = write_library(program, tmp_path / "net.so", BEST, {})
    weights = sum(layer.weight.size for layer in program.layers if hasattr(layer, "weight"))
    assert made.size < 1.1 * weights + 1e6
    listed = subprocess.run(["ldd", str(made.path)], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0].partition(".")[0] for line in listed.splitlines()} <= {
        "linux-vdso",
        "libc",
        "/lib64/ld-linux-x86-64",
    }


def test_without_a_linker_the_object_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgq.export.native import linker

    monkeypatch.setattr(linker, "link_command", lambda: None)
    made = write_library(program_for("mobilenet_v2", 32), tmp_path / "net.so", BEST, {})
    assert made.linked_by is None
    assert made.path.name == "net.o"
    assert made.path.read_bytes().startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang (pip install 'mgq[native]')")
def test_ziglang_links_where_the_system_has_no_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program, images = program_for("mobilenet_v2", 32), noise(32)
    made = write_library(program, tmp_path / "net.so", BEST, {})
    assert made.linked_by == "ziglang cc"
    assert np.array_equal(LibraryRuntime(made.path).run(images), run_reference(program, images)[0])


def test_a_linker_that_fails_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-m", "no_such_linker", "-shared"]
    monkeypatch.setattr("mgq.export.native.linker.link_command", lambda: words)
    with pytest.raises(FailureError, match=r"no_such_linker cannot link the library: .*No module named"):
        write_library(program_for("mobilenet_v2", 32), tmp_path / "net.so", BEST, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_other_libraries_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text("int answer(void) { return 42; }")
    subprocess.run(["cc", "-shared", "-fPIC", "other.c", "-o", "other.so"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="has no mgq_name"):
        LibraryRuntime(tmp_path / "other.so")
    (tmp_path / "text.so").write_text("no code at all, and long enough to look at")
    with pytest.raises(InputError, match="no shared library"):
        LibraryRuntime(tmp_path / "text.so")
    with pytest.raises(InputError, match="cannot read"):
        LibraryRuntime(tmp_path / "missing.so")
    content = bytearray((tmp_path / "other.so").read_bytes())
    content[18:20] = (0xF3).to_bytes(2, "little")  # RISC-V
    (tmp_path / "foreign.so").write_bytes(content)
    with pytest.raises(InputError, match="is for processors other than"):
        LibraryRuntime(tmp_path / "foreign.so")


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_a_library_for_another_processor_says_so(tmp_path: Path) -> None:
    """One that asks for a feature which no processor has: a clear line, and no illegal instruction."""
    from dataclasses import replace

    from mgq.export.native.cpu import Leaf

    foreign = replace(
        PORTABLE, key="of-tomorrow", leaves=(Leaf(1, 0, 2, (12,)), Leaf(0x80000000, 0, 1, tuple(range(32))))
    )
    made = write_library(program_for("mobilenet_v2", 32), tmp_path / "net.so", foreign, {})
    with pytest.raises(InputError, match="of-tomorrow"):
        LibraryRuntime(made.path)


def test_a_level_that_this_processor_lacks_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgq.export.native import cpu

    monkeypatch.setattr(cpu, "host_flags", lambda: frozenset())
    assert get_level("native") is PORTABLE
    with pytest.raises(InputError, match="avx2"):
        NativeRuntime(file, cpu="avx2")
    assert NativeRuntime(file).version == "portable"
