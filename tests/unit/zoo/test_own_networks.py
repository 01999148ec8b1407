"""Networks of the user's own: known to every verb once registered, refused in one line where they cannot be."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import megengine
import numpy as np
import pytest

import mgq
from mgq.data.transforms import to_batch
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import convert, make_random_classifier, open_classifier
from mgq.errors import InputError
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from mgq.runtime.registry import load
from mgq.zoo.own_networks import register_from_file
from mgq.zoo.registry import specs
from tests.conftest import Mgq, the_error

GUIDE = Path(mgq.__file__).parents[1] / "docs" / "guides" / "your-network.md"
EXAMPLE = re.search(r"```python title=\"tiny_net.py\"\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The network of the guide, in a file."""
    assert EXAMPLE is not None
    path = tmp_path / "tiny_net.py"
    path.write_text(EXAMPLE[1], encoding="utf-8")
    return path


def changed(path: Path, old: str, new: str) -> str:
    """``path`` with ``new`` in place of ``old``: what -a names."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return f"{path}:tiny"


def test_the_network_of_the_guide_becomes_an_int8_file(example: Path, tmp_path: Path) -> None:
    spec = register_from_file(f"{example}:tiny")
    assert (spec.name, spec.image_size, spec.head) == ("tiny", 64, "fc.weight")
    int8 = make_random_classifier("tiny", Mode.QUANTIZED, image_size=64, target=ONNX)
    dump_classifier(int8, tmp_path / "tiny.onnx", batch=None)
    images = to_batch([np.full((64, 64, 3), 200, np.uint8)])
    assert np.allclose(load(tmp_path / "tiny.onnx").run(images), int8.logits(images), atol=1e-4)


@pytest.mark.parametrize("exit_at", ["self.dequant(global_average(x))", "global_average(self.dequant(x))"])
def test_int8_answers_as_the_simulation_wherever_integers_end(example: Path, exit_at: str) -> None:
    """The mean of integers is not put on their grid where the network has left it."""
    register_from_file(changed(example, "self.dequant(global_average(x))", exit_at))
    simulated = make_random_classifier("tiny", Mode.QAT, image_size=64, target=ONNX)
    images = np.full((1, 3, 64, 64), 128, np.uint8)
    images[:, :, :8, :8] = 255  # the mean is far below the highest number
    wanted, found = simulated.logits(images), convert(simulated, Mode.QUANTIZED).logits(images)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_registered_network_is_built_by_its_name(example: Path) -> None:
    register_from_file(f"{example}:tiny")
    assert mgq.create_model("tiny", classes=7).fc.out_features == 7


def test_weights_say_how_many_classes_a_registered_network_has(example: Path, tmp_path: Path) -> None:
    """The head of the guide's network reads 32 features, fewer than any of the zoo."""
    spec = register_from_file(f"{example}:tiny")
    weights = tmp_path / "tiny.pkl"
    megengine.save(spec.build(5).state_dict(), str(weights))
    assert len(open_classifier("tiny", weights, Mode.NORMAL).classes) == 5


def test_a_file_imports_modules_that_lie_beside_it(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    (example.parent / "my_widths.py").write_text("WIDTH = 16", encoding="utf-8")
    said = changed(example, "import megengine.module as M", "import megengine.module as M\nfrom my_widths import WIDTH")
    assert register_from_file(said).name == "tiny"


def test_a_file_without_a_function_is_asked_for_one(example: Path, mgq: Mgq) -> None:
    for said in (f"{example}", f"{example}:"):
        assert f"{example}:FUNCTION" in the_error(mgq("train", "-a", said, "-d", example.parent))


def test_a_name_of_the_zoo_cannot_be_taken() -> None:
    for name, said in (("resnet18", "network of mgq's own"), ("a/b", "no name for a network")):
        with pytest.raises(InputError, match=said):
            mgq.register(name, lambda classes: None)


@pytest.mark.parametrize("image_size", [0, 40, "64", 64.0])
def test_an_image_size_is_a_multiple_of_32(image_size: Any) -> None:
    with pytest.raises(InputError, match=f"an image size of {image_size!r} will not do: give a multiple of 32"):
        mgq.register("mine", lambda classes: None, image_size)


def test_a_network_in_place_of_its_function_is_refused(example: Path) -> None:
    network = register_from_file(f"{example}:tiny").build(5)
    with pytest.raises(InputError, match="mine is a network: give the function that builds it"):
        mgq.register("mine", network)


WRONG = {
    "no stub": ("M.QuantStub()", "M.Identity()", "has no QuantStub"),
    "other answers": ("M.Linear(32, classes)", "M.Linear(32, 5)", "with 1x5 numbers, not with 1x3 logits"),
    "fails": ("x = self.stem(", "x = self.trunk(", "cannot run a picture of 1x3x64x64"),
    "no module": ("return Tiny(classes)", "return 3", "gives a int"),
    "no argument": (
        "def tiny(classes)",
        "def tiny(number)",
        "let its argument be called classes",
    ),
    "more arguments": ("def tiny(classes)", "def tiny(classes, width)", "missing a required argument: 'width'"),
    "two answers": ("return self.fc(", "return x, self.fc(", "answers a picture with a tuple"),
    "untraceable": (
        "self.dequant(global_average(x))",
        "M.pooling.avg_pool2d(self.dequant(x), x.shape[2:]).reshape(-1, 32)",
        "cannot be traced",
    ),
    "no function": ("def tiny(", "def small(", "has no function tiny: did you mean Tiny?"),
    "file that ends": ("import megengine.module as M", "import sys; sys.exit(3)", "fails: SystemExit: 3"),
    "function that ends": ("return Tiny(classes)", "raise SystemExit", "fails: SystemExit"),
    "broken file": ("import megengine.module as M", "import nowhere", "ModuleNotFoundError"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_classifier_is_refused(example: Path, what: str) -> None:
    old, new, said = WRONG[what]
    with pytest.raises(InputError, match=re.escape(said)):
        register_from_file(changed(example, old, new))


def test_report_takes_a_network_of_ones_own(example: Path, tmp_path: Path, mgq: Mgq) -> None:
    said = mgq("report", tmp_path / "tiny.calibration", "-a", f"{example}:tiny")
    assert "there is no run" in the_error(said)
    file = example.with_name("tiny.onnx")
    dump_classifier(make_random_classifier(register_from_file(f"{example}:tiny").name, Mode.NORMAL), file, kind="onnx")
    reported = mgq("report", file, "-a", f"{example}:tiny", "--no-engines")
    assert reported.code == 0, reported
    page = html.unescape((file.parent / "tiny.onnx.report.html").read_text(encoding="utf-8"))
    assert f"mgq report {file} -a {example}:tiny --no-engines" in page
    specs().pop("tiny")
    assert "needs -a FILE.py:FUNCTION" in the_error(mgq("report", file, "--no-engines"))


def test_a_file_named_on_the_command_line_is_run(example: Path, tmp_path: Path, mgq: Mgq) -> None:
    said = mgq("dump", "-a", f"{example}:tiny", "-m", "normal")
    assert "no weights for tiny found" in the_error(said)
    assert "there is no file" in the_error(mgq("dump", "-a", f"{tmp_path}/none.py:tiny"))
