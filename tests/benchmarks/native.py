"""How fast is the native engine? ``python -m tests.benchmarks.native [PART...] [--networks A,B] [--rounds N]``

Parts: ``openvino`` (one image on one pinned core, beside OpenVINO), ``avx2`` (the same with AVX2 alone), ``threads``
(two threads over one, and over OpenVINO's two), ``layers`` (share of the processor's int8 peak by kind of layer),
``cost`` (compiling, a warm start, memory as a C program, size). All of them where none is named.

Networks have random weights and 224 pixels. Engines take turns, in alternating order; a turn's time is the shortest of
its runs, and root measures with the priority of real time, so that other work on the machine disturbs little. Shown are
the median of the ratios of the rounds and its 95 % interval, and the load of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mgq.bench.statistics import Speedup, measure_speedup
from mgq.runtime.protocol import Runtime

SIZE = 224
NETWORKS = ("mobilenet_v2", "shufflenet_v1_x1_5_g3", "efficientnet_lite0", "resnet18", "resnet50")
FEW = NETWORKS[:2]
RUNS = 7
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 3, SIZE, SIZE), np.uint8)
Run = Callable[[], object]


def write(path: Path, network: str) -> None:
    """The int8 file of ``network`` for the target onnx."""
    from mgq.engine.classifier.dump import dump_classifier
    from mgq.engine.classifier.open import make_random_classifier
    from mgq.quantization.modes import Mode
    from mgq.quantization.targets import ONNX

    dump_classifier(make_random_classifier(network, Mode.QAT, image_size=SIZE, target=ONNX), path, batch=1, kind="onnx")


def shortest(run: Run) -> int:
    """Of some runs, when the threads of others have gone to sleep."""
    time.sleep(0.003)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return min(times)


def in_turns(runs: Sequence[Run], rounds: int) -> list[list[list[int]]]:
    """For each of ``runs`` its times, by rounds."""
    found: list[list[list[int]]] = [[] for _ in runs]
    for run in runs:
        shortest(run)
    with undisturbed():
        for number in range(rounds):
            places = range(len(runs))
            for place in reversed(places) if number % 2 else places:
                found[place].append([shortest(runs[place])])
    return found


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ahead of other programs, where this one may say so (as root on Linux): with the priority of real time."""

    def all_of_us(policy: int, priority: int) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    try:
        all_of_us(os.SCHED_FIFO, 50)
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        all_of_us(os.SCHED_OTHER, 0)


def text_of(found: Speedup) -> str:
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def median_ms(times: list[list[int]]) -> float:
    return float(np.median(times)) / 1e6


def load_text() -> str:
    return "load " + ", ".join(f"{value:.1f}" for value in os.getloadavg())


def pinned(cores: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def beside_openvino(path: Path, rounds: int, cpu: str) -> None:
    from mgq.runtime.native import NativeRuntime
    from mgq.runtime.openvino import OpenVino

    pinned(1)
    native, other = NativeRuntime(path, cpu=cpu), OpenVino(path)
    logits = native.run(IMAGE), other.run(IMAGE)
    apart = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())
    mine, theirs = in_turns([lambda: native.run(IMAGE), lambda: other.run(IMAGE)], rounds)
    found = text_of(measure_speedup(mine, theirs))
    print(
        f"{path.stem}: {native.version} {median_ms(mine):.2f} ms, OpenVINO {other.version} {median_ms(theirs):.2f} ms, "
        f"native over OpenVINO {found}; logits differ by {apart:.1e} of the largest; {load_text()}; "
        f"OpenVINO runs {kernels_of(other)}",
        flush=True,
    )


def kernels_of(engine: Any) -> str:
    """The kinds of kernel that OpenVINO says it runs."""
    kinds = Counter(
        str(op.get_rt_info()["primitiveType"].astype(str)) for op in engine.network.get_runtime_model().get_ops()
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))


def threads(path: Path, rounds: int) -> None:
    from mgq.runtime.native import NativeRuntime
    from mgq.runtime.openvino import OpenVino

    pinned(2)
    engines: list[Runtime] = [NativeRuntime(path, 1), NativeRuntime(path, 2)]
    assert np.array_equal(engines[0].run(IMAGE), engines[1].run(IMAGE))
    one, two = in_turns([partial(engine.run, IMAGE) for engine in engines], rounds)
    both: list[Runtime] = [engines[1], OpenVino(path, 2)]
    mine, other = in_turns([partial(engine.run, IMAGE) for engine in both], rounds)
    least = [min(min(turn) for turn in times) for times in (one, two)]
    print(
        f"{path.stem}: one thread {median_ms(one):.2f} ms, two {median_ms(two):.2f} ms, two over one "
        f"{text_of(measure_speedup(two, one))}, of the shortest runs {least[0] / least[1]:.2f}; "
        f"two over OpenVINO's two "
        f"{text_of(measure_speedup(mine, other))}; {load_text()}",
        flush=True,
    )


def layers(path: Path, rounds: int) -> None:
    from mgq.bench.peak import PeakLoop
    from mgq.bench.settings import Precision
    from mgq.export.native.compiler import CompiledProgram, object_of
    from mgq.export.native.cpu import NATIVE, get_level
    from mgq.export.native.emit.driver import emit_module
    from mgq.export.native.emit.team import HEADER
    from mgq.export.native.library import Library
    from mgq.export.native.planner import make_plan
    from mgq.export.onnx.onnx_file import read_onnx
    from mgq.runtime.native import program_of
    from mgq.system.environment import this_machine

    pinned(1)
    level = get_level(NATIVE)
    plan = make_plan(program_of(read_onnx(path)), unit=level.isa().unit)
    module = emit_module(plan, level.isa(), "nounwind")
    text = module.text.replace("define internal void @step(", "define void @step(")
    library = Library(CompiledProgram(object_of(text, level), module.constants, module.work), plan.program.classes)
    library.run(IMAGE)
    step = ctypes.CFUNCTYPE(None, ctypes.c_size_t, *[ctypes.c_void_p] * 5, *[ctypes.c_size_t] * 2)(
        library.engine.get_function_address("step")
    )
    work, logits = library.team.work.ctypes.data + HEADER, np.empty((1, plan.program.classes), np.float32)
    places = library.constants.ctypes.data, work, work, IMAGE.ctypes.data, logits.ctypes.data
    count = len(plan.groups)
    times = np.full((rounds, count + 1), np.inf)
    peak = PeakLoop(Precision.INT8, this_machine().features, 1)
    rates = []
    with undisturbed():
        for number in range(rounds):
            for _ in range(RUNS):
                for group in range(count + 1):  # behind the last there is none: what a call costs
                    start = time.perf_counter_ns()
                    step(group, *places, 0, 1)
                    times[number, group] = min(times[number, group], time.perf_counter_ns() - start)
            rates.append(peak.macs / shortest(lambda: peak.run(IMAGE)))
    spent = np.median(times[:, :-1] - times[:, -1:], axis=0)
    kinds = [kind_of(group) for group in plan.groups]
    macs = [sum(macs_of(plan, step) for step in group) for group in plan.groups]
    rate = float(np.median(rates))
    print(f"{path.stem}: {spent.sum() / 1e6:.2f} ms, peak {rate:.0f} GMAC/s; {load_text()}")
    for kind in sorted(set(kinds), key=lambda kind: -sum(spent[i] for i, one in enumerate(kinds) if one == kind)):
        chosen = [i for i, one in enumerate(kinds) if one == kind]
        took, done = spent[chosen].sum(), sum(macs[i] for i in chosen)
        print(f"  {kind}: {took / spent.sum():.0%} of the time, {done / took / rate:.0%} of the peak", flush=True)
    print(f"  all: {sum(macs) / spent.sum() / rate:.0%} of the peak", flush=True)


def kind_of(group: Sequence[Any]) -> str:
    from mgq.export.native.program import Conv

    words = []
    for step in group:
        layer = step.layer
        if not isinstance(layer, Conv):
            words.append(type(layer).__name__.lower())
        elif layer.is_depthwise:
            words.append("depthwise")
        else:
            size = layer.weight.shape[2]
            words.append(f"{size}x{size}" + (" grouped" if layer.groups > 1 else ""))
    return " + ".join(words)


def macs_of(plan: Any, step: Any) -> int:
    weight = getattr(step.layer, "weight", None)
    if weight is None:
        return 0
    target = plan.program.tensors.get(step.layer.output)
    return int(weight.size * (target.height * target.width if target is not None else 1))


MEMORY = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "network.h"
int main(void) {
    int side = mgq_image_size();
    uint8_t *image = calloc(3, (size_t)side * side);
    float *logits = malloc(mgq_classes() * sizeof(float));
    void *work = malloc(mgq_work_size());
    for (int i = 0; i < 3; i++)
        if (mgq_run(image, 1, logits, work) != 0) return 1;
    char line[256];
    FILE *file = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, "VmHWM:", 6)) printf("%d\\n", atoi(line + 6));
    return 0;
}
"""
START = """
import sys, time
import numpy as np
from pathlib import Path
start = time.perf_counter()
from mgq.runtime.native import NativeRuntime
NativeRuntime(Path(sys.argv[1])).run(np.zeros((1, 3, 224, 224), np.uint8))
print(time.perf_counter() - start)
"""


def cost(path: Path, rounds: int) -> None:
    from mgq.export.native.compiler import compile_program
    from mgq.export.native.cpu import NATIVE, get_level
    from mgq.export.native.linker import write_library
    from mgq.export.onnx.onnx_file import read_onnx
    from mgq.runtime.native import NativeRuntime, program_of

    level = get_level(NATIVE)
    program = program_of(read_onnx(path))
    compiling, used = [], []
    command = [sys.executable, "-c", START, str(path)]
    NativeRuntime(path)
    with undisturbed():
        for _ in range(3):
            start, before = time.perf_counter(), time.process_time()
            compile_program(program, level)
            compiling.append(time.perf_counter() - start)
            used.append(time.process_time() - before)
        starts = sorted(
            float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(7)
        )
    folder = path.parent
    made = write_library(program, folder / "network.so", level, {})
    weights = sum(layer.weight.size for layer in program.layers if hasattr(layer, "weight"))
    (folder / "main.c").write_text(MEMORY)
    subprocess.run(["cc", "-O1", "main.c", "./network.so", "-o", "main"], cwd=folder, check=True)
    memory = int(subprocess.run(["./main"], cwd=folder, check=True, capture_output=True, text=True).stdout)
    print(
        f"{path.stem}: compiled in {min(compiling):.2f} s ({min(used):.2f} s of processor), first answer from cache "
        f"{starts[3]:.3f} s after numpy ({starts[0]:.3f} to {starts[-1]:.3f}), C program {memory * 1024 / 1e6:.1f} MB, "
        f"library {made.size / 1e6:.2f} MB for {weights / 1e6:.2f} million int8 parameters; {load_text()}",
        flush=True,
    )


def openvino(path: Path, rounds: int) -> None:
    beside_openvino(path, rounds, "native")


def avx2(path: Path, rounds: int) -> None:
    beside_openvino(path, rounds, "avx2")


PARTS = {"openvino": openvino, "avx2": avx2, "threads": threads, "layers": layers, "cost": cost}
ENVIRONMENT = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
"""What has to be set before a process starts."""


def measure(folder: Path, parts: Sequence[str], networks: Sequence[str], rounds: int) -> None:
    """Each part of each network in a process of its own."""
    for part in parts:
        print(f"\n{part}", flush=True)
        for network in networks or (FEW if part in ("avx2", "layers") else NETWORKS):
            path = folder / f"{network}.onnx"
            for words in (["write"] if not path.exists() else []), [part]:
                if words:
                    command = [sys.executable, "-m", "tests.benchmarks.native", *words, "--file", str(path)]
                    variables = {**os.environ, **ENVIRONMENT.get(part, {})}
                    subprocess.run([*command, "--rounds", str(rounds)], env=variables, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "write", []], default=[])
    parser.add_argument("--networks", default="")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    if given.file is None:
        networks = [name for name in given.networks.split(",") if name]
        with tempfile.TemporaryDirectory(prefix="mgq-native-") as folder:
            measure(Path(folder), given.parts or list(PARTS), networks, given.rounds)
    elif given.parts == ["write"]:
        write(given.file, given.file.stem)
    else:
        PARTS[given.parts[0]](given.file, given.rounds)


if __name__ == "__main__":
    main()
