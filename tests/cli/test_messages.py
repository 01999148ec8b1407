"""What a newcomer types wrong: every error is one line that names the thing and a mend, and leaves nothing behind."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from mgq.cli.console import say
from mgq.cli.main import run_alone
from mgq.data.decoding import bundled_cat
from mgq.machine import DEBUG_VARIABLE
from tests.conftest import Mgq

WEIGHTS = (".pth", ".safetensors", ".onnx", ".so", ".megengine")
TEXTS = {
    "notes.txt": "hello",
    "text.jpg": "no picture",
    "broken.toml": "epochs = = 3",
    "keys.toml": "epoch = 3",
    "type.toml": 'epochs = "three"',
    "qat.toml": 'mode = "qat"',
    "fake.safetensors": "hello",
    "fake.pth": "hello",
    "fake.onnx": "hello",
    "fake.megengine": "hello",
    "fake.json": "{",
    **{f"page{suffix}": "<!DOCTYPE html><html>404" for suffix in WEIGHTS},
    **{f"pointer{suffix}": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n" for suffix in WEIGHTS},
    **{f"nothing{suffix}": "" for suffix in WEIGHTS},
}
READ_RUNS = ("infer", "eval", "dump", "analyze", "report", "bench", "models")
CHOOSE_WEIGHTS = ("infer", "eval", "dump", "analyze", "calibrate", "train", "qat")
FOLDERS = ("empty", "one/train/a", "one/val/a", "noval/train/a", "noval/train/b")

# What is typed, and what the line has to say: the thing and the mend.
WRONG = [
    # verbs and options
    ("infr", "'infr'", "did you mean `mgq infer`"),
    ("trian", "'trian'", "did you mean `mgq train`"),
    ("evaluate", "'evaluate'", "did you mean `mgq eval`"),
    ("benhc", "'benhc'", "did you mean `mgq bench`"),
    ("models resnet18", "resnet18", "mgq models --help"),
    ("--nonsense", "--nonsense", "mgq --help"),
    ("infer --debug", "--debug", "before the verb"),
    ("infer --jobs 2", "--jobs", "one of `mgq train`"),
    ("eval --epochs 3", "--epochs", "one of `mgq train`"),
    ("train --observer ema", "--observer", "one of `mgq qat`"),
    ("qat --from-scratch", "--from-scratch", "one of `mgq train`"),
    ("infer --jsom", "--jsom", "did you mean --json"),
    ("infer --topk", "--topk", "requires an argument"),
    ("eval cat.jpg", "cat.jpg", "mgq eval --help"),
    # names
    ("infer -a resnet-18", "'resnet-18'", "did you mean resnet18"),
    ("infer -a ''", "''", "mgq models"),
    ("bench -a mobilenetv2", "'mobilenetv2'", "did you mean mobilenet_v2"),
    ("infer -m quantised", "'quantised'", "did you mean quantized"),
    ("dump -m float", "'float'", "choose normal, qat, quantized"),
    ("infer --target onx", "'onx'", "did you mean onnx"),
    ("qat --target tensorrt", "'tensorrt'", "choose megengine"),
    ("infer --engine onnx", "'onnx'", "did you mean onnxruntime"),
    ("calibrate --quality bets", "'bets'", "did you mean best"),
    ("calibrate --method min_max", "'min_max'", "did you mean min-max"),
    ("qat --observer minmax", "'minmax'", "did you mean min-max"),
    ("dump --format tflite", "'tflite'", "choose megengine, onnx"),
    ("dump --input int4", "'int4'", "choose uint8, int8"),
    ("dump --check deep", "'deep'", "choose logits"),
    ("train --schedule cosin", "'cosin'", "did you mean cosine"),
    ("train -a mobilenet_v2 --activation gelu", "'gelu'", "relu6"),
    ("bench --mode fast", "'fast'", "choose latency, throughput"),
    # numbers
    ("infer --topk -1", "--topk -1", "give at least 1"),
    ("infer --topk 2.5", "--topk 2.5", "whole number"),
    ("infer --topk 1001", "1001", "give 1 to 1000"),
    ("infer --image-size 0", "--image-size 0", "32 would do"),
    ("infer --image-size -32", "--image-size -32", "32 would do"),
    ("infer --image-size 100000", "--image-size 100000", "4096 would do"),
    ("dump --image-size 33", "--image-size 33", "32 would do"),
    ("infer --width nan", "--width nan", "give more than 0"),
    ("infer --width 0", "--width 0", "give more than 0"),
    ("eval --limit -3", "--limit -3", "give at least 1"),
    ("eval --limit many", "--limit many", "whole number"),
    ("eval --max-bad nan", "--max-bad nan", "give 0 to 1"),
    ("calibrate --images 0", "--images 0", "give at least 1"),
    ("calibrate --limit 0", "--limit 0", "give at least 1"),
    ("calibrate --max-drop nan", "--max-drop nan", "give at least 0"),
    ("calibrate --max-bad 7", "--max-bad 7", "give 0 to 1"),
    ("analyze --images 0", "--images 0", "give at least 1"),
    ("dump --batch -1", "--batch -1", "give 0 to 65,536"),
    ("dump --batch 99999999999", "--batch 99999999999", "give 0 to 65,536"),
    ("train --epochs 1.5", "--epochs 1.5", "whole number"),
    ("train --epochs -1", "--epochs -1", "give 1 to"),
    ("train --batch-size 0", "--batch-size 0", "give 1 to"),
    ("train --lr nan", "--lr nan", "give at least 0"),
    ("train --lr inf", "--lr inf", "give at least 0"),
    ("train --lr fast", "--lr fast", "is not a number"),
    ("train --ema 2", "--ema 2", "give 0 to less than 1"),
    ("train --label-smoothing -1", "--label-smoothing -1", "give 0 to 1"),
    ("train --weight-decay -1", "--weight-decay -1", "give at least 0"),
    ("train --image-size 100", "--image-size 100", "96 would do"),
    ("train --limit -1", "--limit -1", "give at least 1"),
    ("train --limit 0", "--limit 0", "give at least 1"),
    ("train --seed -1", "--seed -1", "give 0 to"),
    ("train --width 0.5", "width", "leave it out"),
    ("train --classes 1", "--classes 1", "give 2 to"),
    ("train -n -1", "--ngpus -1", "give at least 0"),
    ("train --nnodes 0", "--nnodes 0", "give at least 1"),
    ("train --nnodes 2 --node-rank 3", "--node-rank 3", "count machines from 0"),
    ("train -w -1", "--workers -1", "give at least 0"),
    ("bench --batch 0", "--batch 0", "give at least 1"),
    ("bench --rounds 0", "--rounds 0", "give at least 1"),
    ("bench --batch 100000", "--batch 100000", "give a smaller --batch"),
    ("bench --threads many", "--threads many", "give 1 to"),
    ("bench --train --image-size 3", "--image-size 3", "32 would do"),
    # files and folders
    ("infer empty", "empty has no pictures", "name another folder"),
    ("infer -dash.jpg", "-dash.jpg", "write ./-dash.jpg"),
    ("infer https://example.com/cat.jpg", "https://example.com/cat.jpg is an address", "download it"),
    ("infer -c https://example.com/net.pth", "https://example.com/net.pth is an address", "download it"),
    ("eval -d file:///data/photos", "file:///data/photos is an address", "/data/photos"),
    ("calibrate s3://bucket/photos", "s3://bucket/photos is an address", "download it"),
    ("infer *.nothing", "*.nothing", "check the pattern"),
    ("infer -c empty", "empty is a folder", "give a weights file"),
    ("infer -c notes.txt", "notes.txt", "get it again"),
    ("infer -c fake.pth", "fake.pth", "get it again"),
    ("infer -c fake.megengine", "fake.megengine", "mgq dump"),
    ("infer -c fake.onnx", "fake.onnx", "write it again"),
    *((f"infer -c page{suffix}", f"page{suffix} is a web page", "download the file") for suffix in WEIGHTS),
    *((f"infer -c pointer{suffix}", f"pointer{suffix} is a pointer of Git LFS", "git lfs pull") for suffix in WEIGHTS),
    *((f"infer -c nothing{suffix}", f"nothing{suffix} is empty", "get it again") for suffix in WEIGHTS),
    ("infer --ranges fake.json", "fake.json", "mgq calibrate"),
    ("infer --ranges empty", "empty", "mgq calibrate"),
    ("infer -s notes.txt", "--save notes.txt", "give a folder"),
    ("eval -d empty", "empty has no class folders", "make a folder of pictures for each class"),
    ("eval -d notes.txt", "notes.txt is not a folder", "name a folder"),
    ("train -d empty", "has no class folders", "make a folder of pictures for each class"),
    ("qat -a resnet18 -d missing", "missing does not exist", "check the path"),
    ("train -d noval", "no folder val/", "make it"),
    ("train -d one", "1 class folder", "make a folder of pictures for each class"),
    ("train -s notes.txt", "--save notes.txt", "give a folder"),
    ("train -c fake.onnx", "fake.onnx", "write it again"),
    ("qat -c fake.safetensors", "fake.safetensors", "get it again"),
    ("train --recipe broken.toml", "broken.toml", "recipe.toml of any run"),
    ("train --recipe keys.toml", "'epoch'", "did you mean epochs"),
    ("train --recipe type.toml", "epochs", "give a whole number"),
    ("train --recipe qat.toml", "qat.toml", "mgq qat --recipe"),
    ("train --recipe empty", "empty", "check the path"),
    ("train --from-scratch --pretrained", "--from-scratch", "leave"),
    ("qat --resume", "resume", "runs"),
    ("calibrate empty", "empty has no pictures", "name another folder"),
    ("calibrate -d missing", "missing does not exist", "check the path"),
    ("analyze cat.jpg -d empty", "-d", "give one of them"),
    ("dump -o net.onnx --format megengine", "net.onnx", ".megengine"),
    ("dump -o net.onx", "net.onx", ".megengine or .onnx"),
    ("dump -c fake.onnx", "fake.onnx", "write it again"),
    ("bench --train --json empty", "empty", "folder"),
    ("bench --against missing.onnx", "missing.onnx", "check the path"),
    ("bench --plot plot.txt", "plot.txt", ".png"),
    ("bench --markdown --json -", "--markdown", "give --json a file"),
    ("bench --int8 --fp32", "--int8", "leave both out"),
    ("bench --train --torch-python missing", "--torch-python missing does not exist", "check the path"),
    (
        "bench --train --torch-python one/train",
        "--torch-python one/train does not run (Permission denied)",
        "name a Python",
    ),
    # folders of runs that are none
    *((f"{verb} -s missing", "--save missing does not exist", "check the path") for verb in READ_RUNS),
    *(
        (f"{verb} -s empty", "--save empty has no run of ", "makes one")
        for verb in ("infer", "eval", "dump", "analyze")
    ),
    ("bench -s empty", "--save empty has no run of resnet18", "`mgq train -a resnet18` makes one"),
    ("infer -s made/resnet18.qat", "resnet18.qat is a run itself", "-c made/resnet18.qat/checkpoint.safetensors"),
    ("infer -s made", "--save made has no run of efficientnet_lite0", "`-a resnet18` takes it"),
    ("infer -s made -a mobilenet_v2", "no run of mobilenet_v2", "`mgq calibrate -a mobilenet_v2`"),
    # options that could have no effect
    ("infer --key x", "--key", "-c"),
    ("infer --rgb", "--rgb is for ONNX files of others", "-c"),
    ("eval --bgr", "--bgr is for ONNX files of others", "-c"),
    ("report --labels notes.txt", "--labels notes.txt is for ONNX files", "-c"),
    *((f"{verb} -c w.pth --pretrained", "--pretrained takes the zoo's", "leave out one") for verb in CHOOSE_WEIGHTS),
    *((f"{verb} -m normal --target onnx", "--target is for int8", "leave out") for verb in ("infer", "eval", "dump")),
    ("infer -m normal --ranges fake.json", "--ranges fake.json is for int8", "leave out one of them"),
    ("dump --format native --check layers", "--check", "--format onnx"),
    ("dump -o net.so -d empty", "--data empty is for comparing an .onnx file", "--format onnx"),
    ("dump --target megengine --tune", "--tune is for .onnx files", "--format onnx"),
    ("dump -o net.onnx -d empty --check none", "--data empty is for comparing", "leave out one of them"),
    ("dump -m normal -o net.onnx --check layers", "--check layers", "leave out one of them"),
    ("dump -o net.so --batch 4", "--batch", "leave it out"),
    ("dump -o net.onnx --cpu avx2", "--cpu is for native libraries", "--format native"),
    ("dump -o net.onnx --input int8", "takes uint8 pixels, not int8", "leave --input out"),
    ("dump -o net.onnx -m normal --for openvino", "--for chooses where int8", "leave out one of them"),
    ("dump -o net.so --for openvino", "--for is for ONNX files", "--format onnx"),
    ("dump -o net.megengine --batch 0", "--batch 0", "--format onnx"),
    ("dump -o net.megengine --target onnx", "target onnx", "--format onnx"),
    ("dump -o net.so -m normal", "mode normal", "-m quantized"),
    ("dump -m normal --keep-input -o net.onnx", "--keep-input is for int8", "imported"),
    ("dump --batch 4 --keep-input -o net.onnx", "--batch", "leave out one of them"),
    ("calibrate --data-free --images 3", "--images is for calibration on pictures", "leave out one of them"),
    ("calibrate cat.jpg --data-free", "FILES is for calibration on pictures", "leave out one of them"),
    ("calibrate --data-free --no-bias-correction", "--no-bias-correction", "leave out one of them"),
    ("calibrate --ranges r.json --max-drop 1", "--max-drop", "leave out one of them"),
    ("analyze --json --worst 3", "--worst is for the table", "leave it out"),
    ("train --from-scratch --new-head", "--new-head", "leave out one of them"),
    ("train --node-rank 0", "--node-rank is for several machines", "--nnodes"),
    ("train --master foo", "--master is for several machines", "--nnodes"),
    ("train --jobs 2 --nnodes 2", "--jobs is for one machine", "leave out one of them"),
    ("train --sync-bn -n 0", "--sync-bn", "--jobs"),
    ("train --compress fp16 --jobs 2", "--compress", "mpirun"),
    ("bench --train cat.jpg", "FILES is for inference", "leave out one of them"),
    ("bench --train -s made", "--save made is for inference", "leave out one of them"),
    ("bench --no-stock", "--no-stock belongs to --train", "give that, too"),
    ("bench cat.onnx -a resnet18", "--arch is for networks, not for files", "leave it out"),
    ("bench cat.onnx -s made", "--save made is for networks, not for files", "leave it out"),
    ("bench -c w.pth --int8", "--int8 is for networks of the zoo", "leave it out"),
    ("bench -c w.pth --image-size 64", "--image-size is in the files already", "leave it out"),
    ("bench -c w.pth --batch 2", "--batch is 1", "leave it out"),
    ("serve --fd 3 --port 80", "--port opens a socket", "leave out one of them"),
]


@pytest.fixture
def desk(tmp_path: Path) -> set[Path]:
    """Things that a newcomer may give by mistake; all that is there."""
    for name in FOLDERS:
        (tmp_path / name).mkdir(parents=True)
        if name != "empty":
            (tmp_path / name / "1.jpg").write_bytes(bundled_cat().read_bytes())
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    for name in ("resnet18.qat", "mobilenet_v2.normal"):
        (tmp_path / "made" / name).mkdir(parents=True)
        (tmp_path / "made" / name / "checkpoint.safetensors").touch()
    for name in ("cat.jpg", "-dash.jpg"):
        (tmp_path / name).write_bytes(bundled_cat().read_bytes())
    return set(tmp_path.rglob("*"))


@pytest.mark.parametrize(("typed", "thing", "mend"), WRONG, ids=[typed for typed, *_ in WRONG])
def test_an_error_is_one_line_that_names_the_thing_and_a_mend(
    mgq: Mgq, desk: set[Path], tmp_path: Path, typed: str, thing: str, mend: str
) -> None:
    said = mgq(*shlex.split(typed))
    assert said.code == 2 and said.out == "", said
    assert said.err.startswith("error: ") and said.err.endswith("\n") and said.err.count("\n") == 1, said.err
    assert thing in said.err and mend in said.err
    assert set(tmp_path.rglob("*")) == desk


def test_debug_adds_a_traceback_and_keeps_the_line_and_the_exit_code(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    said = mgq("infer", "missing.jpg")
    assert said.code == 2 and "Traceback" in said.err
    assert said.err.splitlines()[-1] == "error: missing.jpg does not exist: check the path"


@pytest.mark.parametrize("terminal", [False, True])
def test_long_lines_break_between_words_on_a_terminal_and_nowhere_in_a_pipe(terminal: bool) -> None:
    sink = io.StringIO()
    words = "a network [of] weights that come from a long way away and whose origin is a long story to tell"
    say(words, to=Console(file=sink, force_terminal=terminal, width=40, color_system=None))
    lines = sink.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines) == words
    assert len(lines) == (3 if terminal else 1) and (not terminal or all(len(line) <= 40 for line in lines))


def test_memory_that_does_not_suffice_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out() -> None:
        raise MemoryError

    monkeypatch.setattr("mgq.cli.main.run_verb", run_out)
    assert run_alone() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "memory is short: take a smaller --batch" in said
