"""Checkpoints as other programs write them: which network is in them, and what else is read past, named or refused.

The network is a narrow MobileNetV2 under torchvision's names, in files that are forged opcode by opcode.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import save_file

import mgq as package
from mgq.engine.calibration.calibration_run import calibrate_data_free
from mgq.engine.classifier.deployed_files import open_file
from mgq.engine.classifier.open import Classifier, open_classifier
from mgq.errors import FailureError, InputError
from mgq.export.megengine.megengine_file import encode_file, read_megengine_file
from mgq.quantization.modes import Mode
from mgq.reports.finished_run import find_float_weights, find_run
from mgq.weights.finite_values import fault_of
from mgq.weights.state_file import read_state
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import Weights, read_weights
from tests.conftest import CLASSES, Mgq, State, classifier_of, one_line_about, the_error
from tests.fakes.foreign_values import BESIDE, NAMESPACE, value
from tests.fakes.measured_ranges import measure_ranges
from tests.fakes.pytorch_networks import made_up, mobilenet_names, resnet_names
from tests.fakes.weight_files import (
    ORDERED,
    REBUILD,
    Call,
    Forge,
    Name,
    Writer,
    both_formats,
    pickled,
    zipped,
)

MOBILE = "mobilenet_v2"
HEAD = "classifier.1.weight"


def network(change: float = 1.0) -> State:
    """A network under torchvision's names, the same for the same ``change`` of its classifier."""
    state = made_up(mobilenet_names(0.5, CLASSES))
    return {**state, HEAD: (state[HEAD] * change).astype(np.float32)}


@pytest.fixture(scope="module")
def good() -> State:
    return network()


@pytest.fixture(scope="module")
def other() -> State:
    """Another network of the same names."""
    return network(0.5)


def prefixed(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def forged(forge: Forge, value: object) -> object:
    """``value`` with tensors in place of the arrays in it."""
    if isinstance(value, np.ndarray):
        return forge.tensor(value)
    if isinstance(value, dict):
        return {name: forged(forge, inner) for name, inner in value.items()}
    return [forged(forge, inner) for inner in value] if isinstance(value, list) else value


def written(path: Path, root: object, write: Writer = Forge.zip) -> Path:
    forge = Forge()
    path.write_bytes(write(forge, forged(forge, root)))
    return path


def is_network(weights: Weights, state: State) -> bool:
    """Whether ``weights`` are those of ``state``, told by the classifier."""
    return weights.arch == MOBILE and np.array_equal(weights.state[HEAD], state[HEAD])


def refusal(path: Path, *arguments: Any, **words: Any) -> str:
    with pytest.raises(InputError) as error:
        read_weights(path, *arguments, **words)
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable()
    return message


class TestPrefixes:
    @pytest.mark.parametrize(
        "prefix",
        [
            "module.",
            "_orig_mod.",
            "_orig_mod.module.",
            "module._orig_mod.",
            "model.",
            "net.",
            "backbone.",
            "model.backbone.",
            "a word of one's own.0.",
        ],
    )
    def test_what_all_names_begin_with_is_taken_off_and_said(self, prefix: str, good: State, tmp_path: Path) -> None:
        weights = read_weights(written(tmp_path / "w.pth", prefixed(prefix, good)))
        assert is_network(weights, good)
        assert f"without the prefix '{prefix}'" in weights.origin

    def test_names_without_a_prefix_stay_as_they_are(self, good: State, tmp_path: Path) -> None:
        weights = read_weights(written(tmp_path / "w.pth", good))
        assert weights.origin == f"{tmp_path / 'w.pth'} (torch zip, torchvision names)"

    def test_only_as_much_is_taken_off_as_makes_a_network_of_it(self, tmp_path: Path) -> None:
        """All names of the body begin with features: which is no prefix."""
        body = {name: value for name, value in network().items() if name.startswith("features.")}
        for state in (body, prefixed("model.", body)):
            assert one_line_about(refusal(written(tmp_path / "w.pth", state)), "has no classifier", "--new-head")

    def test_what_does_not_fit_is_named_without_its_prefix(self, good: State, tmp_path: Path) -> None:
        more = {**good, "features.3.se.fc.weight": np.ones((2, 3), np.float32)}
        message = refusal(written(tmp_path / "w.pth", prefixed("module.", more)))
        assert one_line_about(message, "does not fit mobilenet_v2: it has features.3.se.fc.weight (2, 3)")

    def test_another_architecture_is_told_through_the_prefix(self, good: State, tmp_path: Path) -> None:
        message = refusal(written(tmp_path / "w.pth", prefixed("module.", good)), spec_of("resnet18"))
        assert one_line_about(message, "does not fit resnet18", f"its names are those of {MOBILE}, pass -a")

    def test_a_file_of_safetensors_has_prefixes_as_well(self, good: State, tmp_path: Path) -> None:
        save_file(prefixed("model.", good), str(tmp_path / "w.safetensors"))
        assert is_network(read_weights(tmp_path / "w.safetensors"), good)


class TestCountersAndBuffers:
    def test_counters_are_left_out_and_said(self, good: State, tmp_path: Path) -> None:
        averaged = {**prefixed("module.", good), "n_averaged": np.array(100, np.int64)}
        weights = read_weights(written(tmp_path / "w.pth", averaged))
        assert is_network(weights, good)
        assert "without the prefix 'module.', leaving out n_averaged" in weights.origin

    @pytest.mark.parametrize(
        "more",
        [
            {"epoch": 3},
            {"num_updates": np.array(3, np.int32)},
            {"aux.mask": np.ones((7, 7), np.bool_)},
            {"features.0.total_ops": np.zeros(1), "features.0.total_params": np.zeros(1)},
        ],
        ids=lambda more: next(iter(more)),
    )
    def test_whole_numbers_are_no_weights(self, more: dict[str, object], good: State, tmp_path: Path) -> None:
        weights = read_weights(written(tmp_path / "w.pth", {**good, **more}))
        assert is_network(weights, good)
        assert f"leaving out {', '.join(more)}" in weights.origin

    @pytest.mark.parametrize("name", ["pool.p", "features.0.0.bias", "attention.weight"])
    def test_numbers_that_may_matter_are_never_left_out(self, name: str, good: State, tmp_path: Path) -> None:
        message = refusal(written(tmp_path / "w.pth", {**good, name: np.ones(1, np.float32)}))
        assert "does not fit mobilenet_v2: it has" in message

    def test_what_lies_beside_a_whole_network_is_left_out_and_said(self, good: State, tmp_path: Path) -> None:
        loss = {"criterion.weight": np.ones(CLASSES, np.float32)}
        weights = read_weights(written(tmp_path / "w.ckpt", {"state_dict": {**prefixed("model.", good), **loss}}))
        assert is_network(weights, good)
        assert "without the prefix 'model.', leaving out criterion.weight" in weights.origin

    @pytest.mark.parametrize(("mean", "fits"), [((0.485, 0.456, 0.406), True), ((0.5, 0.5, 0.5), False)])
    def test_another_normalization_than_what_is_folded_in_is_refused(
        self, mean: tuple[float, ...], fits: bool, good: State, tmp_path: Path
    ) -> None:
        buffer = np.array(mean, np.float32).reshape(3, 1, 1)
        path = written(tmp_path / "w.pth", {**prefixed("model.", good), "normalize.mean": buffer})
        if fits:
            assert "leaving out normalize.mean" in read_weights(path).origin
        else:
            assert one_line_about(refusal(path), "normalizes pictures by its own normalize.mean (0.5, 0.5, 0.5)")

    def test_counters_of_batch_norms_may_be_missing(self, good: State, tmp_path: Path) -> None:
        old = {name: value for name, value in good.items() if "num_batches" not in name}
        assert is_network(read_weights(written(tmp_path / "w.pth", old)), good)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_other_precisions_are_read(self, dtype: type, good: State, tmp_path: Path) -> None:
        state = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in good.items()}
        weights = read_weights(written(tmp_path / "w.pth", state))
        assert np.array_equal(state_of(weights.network)[HEAD], good[HEAD].astype(dtype).astype(np.float32))


class TestSeveralNetworks:
    @pytest.mark.parametrize(
        ("taken", "left"),
        [
            ("state_dict_ema", "state_dict"),
            ("model_ema", "model"),
            ("params_ema", "params"),
            ("ema", "model"),
            ("ema_state_dict", "model_state_dict"),
            ("ema_state_dict", "model"),
            ("model_state_dict_ema", "model_state_dict"),
            ("ema_model_state_dict", "model_state_dict"),
            ("state_dict", "ema_state_dict"),
            ("state_dict", "current_model_state"),
        ],
    )
    def test_the_one_that_the_program_itself_prefers_is_taken_and_said(
        self, taken: str, left: str, good: State, other: State, tmp_path: Path
    ) -> None:
        for first, second in ((taken, left), (left, taken)):
            states = {first: good if first == taken else other, second: good if second == taken else other}
            path = written(tmp_path / "w.pth", {**states, "epoch": 1})
            weights = read_weights(path)
            assert is_network(weights, good)
            assert f"network '{taken}', not '{left}'" in weights.origin
            assert is_network(read_weights(path, key=left), other)

    def test_without_a_preference_the_user_chooses(self, good: State, other: State, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", {"student": good, "teacher": other})
        assert one_line_about(refusal(path), "'student' and 'teacher'", "--key student")
        assert is_network(read_weights(path, key="student"), good)
        assert is_network(read_weights(path, key="teacher"), other)

    def test_networks_side_by_side_in_one_state_dict_are_told_apart(
        self, good: State, other: State, tmp_path: Path
    ) -> None:
        path = written(tmp_path / "w.pth", {**prefixed("student.", good), **prefixed("teacher.net.", other)})
        assert one_line_about(refusal(path), "2 networks, 'student' and 'teacher.net'", "--key student")
        assert is_network(read_weights(path, key="student"), good)
        assert is_network(read_weights(path, key="teacher"), other)
        assert is_network(read_weights(path, key="teacher.net"), other)
        assert "network 'teacher.net'" in read_weights(path, key="teacher.net").origin

    def test_with_a_the_one_of_that_architecture_is_taken(self, good: State, tmp_path: Path) -> None:
        teacher = made_up(resnet_names(18, CLASSES))
        path = written(tmp_path / "w.pth", {**prefixed("student.", good), **prefixed("teacher.", teacher)})
        assert "'student' and 'teacher'" in refusal(path)
        weights = read_weights(path, spec_of(MOBILE))
        assert is_network(weights, good)
        assert "without the prefix 'student.', leaving out teacher." in weights.origin

    @pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
    def test_the_only_one_under_its_usual_name_needs_no_word(self, key: str, good: State, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", {key: good, "best_acc1": np.array(71.0), "optimizer": {"state": {}}})
        weights = read_weights(path)
        assert is_network(weights, good)
        assert weights.origin == f"{path} (torch zip, torchvision names)"

    @pytest.mark.parametrize("keys", [("params",), ("teacher",), ("model", "ema"), ("a", "b", "c")])
    def test_the_only_one_under_another_name_is_said(self, keys: tuple[str, ...], good: State, tmp_path: Path) -> None:
        root: dict[str, Any] = good
        for key in reversed(keys):
            root = {key: root}
        path = written(tmp_path / "w.pth", root)
        weights = read_weights(path)
        assert is_network(weights, good)
        assert f"network '{'.'.join(keys)}'" in weights.origin
        assert is_network(read_weights(path, key=".".join(keys)), good)

    def test_the_state_of_an_optimizer_is_no_network(self, good: State, tmp_path: Path) -> None:
        moments = {"exp_avg": np.ones((3, 4), np.float32), "step": np.array(1.0, np.float32)}
        state = {0: moments, "features.0.0.weight": moments}
        assert is_network(read_weights(written(tmp_path / "w.pth", {"optimizer": {"state": state}, "x": good})), good)

    def test_pairs_of_names_and_tensors_are_a_state_dict(self, good: State, tmp_path: Path) -> None:
        forge = Forge()
        pairs = [(name, forge.tensor(array)) for name, array in good.items()]
        (tmp_path / "w.pth").write_bytes(forge.zip(pairs))
        assert is_network(read_weights(tmp_path / "w.pth"), good)
        weights = read_weights(written(tmp_path / "w.pth", [good, {"lr": 0.1}]))
        assert is_network(weights, good) and "network '0'" in weights.origin

    def test_an_unknown_key_lists_what_there_is(self, good: State, other: State, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", {"model": good, "model_ema": other})
        assert one_line_about(refusal(path, key="ema"), "has no network 'ema': it has 'model', 'model_ema'")
        path = written(tmp_path / "w.pth", {**prefixed("student.", good), **prefixed("teacher.", other)})
        assert "has no network 'nobody': it has 'student', 'teacher'" in refusal(path, key="nobody")

    def test_a_checkpoint_of_mgq_has_one_network(self, tmp_path: Path) -> None:
        path = tmp_path / "c.safetensors"
        classifier_of("shufflenet_v1_x0_5_g3").write_checkpoint(path)
        assert "leave out --key" in refusal(path, key="features")

    def test_safetensors_have_parts_by_their_names(self, good: State, other: State, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        save_file({**prefixed("student.", good), **prefixed("teacher.", other)}, str(path))
        assert is_network(read_weights(path, key="teacher"), other)
        assert "'student' and 'teacher'" in refusal(path)


class TestHeadsOfOtherNames:
    @pytest.mark.parametrize("head", ["head", "fc", "head.fc", "classifier.0"])
    def test_the_only_linear_layer_is_the_classifier(self, head: str, good: State, tmp_path: Path) -> None:
        renamed = {name.replace("classifier.1", head): value for name, value in good.items()}
        weights = read_weights(written(tmp_path / "w.pth", renamed))
        assert is_network(weights, good)
        assert f"the head '{head}' as 'classifier.1'" in weights.origin

    @pytest.mark.parametrize("outer", ["", "module."])
    def test_it_may_stand_beside_the_backbone(self, outer: str, good: State, tmp_path: Path) -> None:
        body = {name: value for name, value in good.items() if not name.startswith("classifier")}
        head = {f"head.{part}": good[f"classifier.1.{part}"] for part in ("weight", "bias")}
        weights = read_weights(written(tmp_path / "w.pth", prefixed(outer, {**prefixed("backbone.", body), **head})))
        assert is_network(weights, good)
        assert f"without the prefix '{outer}backbone.', the head '{outer}head' as 'classifier.1'" in weights.origin

    def test_one_that_does_not_fit_is_named(self, good: State, tmp_path: Path) -> None:
        renamed = {name.replace("classifier.1", "head"): value for name, value in good.items()}
        renamed["head.weight"] = renamed["head.weight"][:, 1:]
        assert one_line_about(refusal(written(tmp_path / "w.pth", renamed)), "does not fit", "head.weight")


@pytest.mark.parametrize("averaged", ["model_ema", "ema"])
@pytest.mark.parametrize("left", ["state_dict", "model", "model_state_dict", "net"])
def test_averaged_weights_are_taken_beside_the_last_ones(
    averaged: str, left: str, good: State, other: State, tmp_path: Path
) -> None:
    weights = read_weights(written(tmp_path / "w.pth", {left: other, averaged: good, "epoch": 1}))
    assert is_network(weights, good)
    assert f"network '{averaged}', not '{left}'" in weights.origin


def test_counters_of_averaging_are_left_out(good: State, tmp_path: Path) -> None:
    extra = {"n_averaged": np.array(7), "num_updates": np.array(5.0, np.float32), "decay": np.array(0.9, np.float32)}
    weights = read_weights(written(tmp_path / "w.pth", {**prefixed("module.", good), **extra}))
    assert is_network(weights, good)
    assert "leaving out n_averaged, num_updates, decay" in weights.origin


@pytest.mark.parametrize("first", ["backbone.", "module.", "model.", "_orig_mod.", "net."])
@pytest.mark.parametrize("second", ["", "module.", "backbone."])
def test_prefixes_are_taken_off_one_in_the_other_too(first: str, second: str, good: State, tmp_path: Path) -> None:
    weights = read_weights(written(tmp_path / "w.pth", prefixed(first + second, good)))
    assert is_network(weights, good)
    assert f"without the prefix '{first}{second}'" in weights.origin


class TestKeyOfTheCommand:
    @pytest.fixture
    def pair(self, good: State, other: State, tmp_path: Path) -> Path:
        return written(tmp_path / "pair.pth", {"state_dict": other, "state_dict_ema": good})

    def test_every_verb_that_reads_weights_knows_it(self, mgq: Mgq, pair: Path) -> None:
        for verb in ("infer", "eval", "calibrate", "analyze", "dump", "train", "qat", "report"):
            error = the_error(mgq(verb, "-c", pair, "--key", "nobody"))
            assert "has no network 'nobody': it has 'state_dict', 'state_dict_ema'" in error, verb

    def test_infer_says_which_network_answers(self, mgq: Mgq, pair: Path) -> None:
        taken = mgq("infer", "-c", pair, "-m", "normal", "--image-size", "32", "--topk", "2")
        assert taken.code == 0 and "network 'state_dict_ema', not" in " ".join(taken.out.split())
        chosen = mgq("infer", "-c", pair, "-m", "normal", "--image-size", "32", "--topk", "2", "--key", "state_dict")
        assert chosen.code == 0 and "network 'state_dict', not 'state_dict_ema'" in " ".join(chosen.out.split())
        assert taken.out != chosen.out

    def test_it_needs_a_file_to_choose_in(self, mgq: Mgq) -> None:
        assert one_line_about(the_error(mgq("infer", "--key", "ema")), "--key ema", "-c")

    @pytest.mark.parametrize("name", ["a.onnx", "a.megengine"])
    def test_finished_files_have_none(self, mgq: Mgq, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        assert "leave out --key" in the_error(mgq("infer", "-c", name, "--key", "ema"))

    @pytest.mark.slow
    def test_a_report_compares_with_the_network_that_was_chosen(self, pair: Path, other: State, tmp_path: Path) -> None:
        chosen = open_classifier(checkpoint=pair, mode=Mode.NORMAL, key="state_dict", image_size=32)
        calibrate_data_free(chosen).write(tmp_path / "runs")
        weights, why_not = find_float_weights(find_run(f"{MOBILE}.calibration", tmp_path / "runs"))
        assert weights is not None and is_network(weights, other), why_not

    @pytest.mark.slow
    def test_qat_says_what_it_begins_with(self, mgq: Mgq, pair: Path) -> None:
        small = ("--epochs", "1", "--limit", "10", "--batch-size", "5", "--image-size", "32")
        said = mgq("qat", "-c", pair, "--key", "state_dict", *small)
        assert f"{MOBILE}: begins with {pair} (torch zip, network 'state_dict', not 'state_dict_ema'" in said.err

    def test_python_has_the_same_word(self, pair: Path, other: State) -> None:
        target = package.create_model(MOBILE, CLASSES, width=0.5, activation="relu6")
        package.load_weights(target, pair, key="state_dict")
        assert np.array_equal(state_of(target)[HEAD], other[HEAD])
        assert "'state_dict'" in open_classifier(checkpoint=pair, mode=Mode.NORMAL, key="state_dict").origin


LIST = Name("__builtin__", "list")
UTC = value("datetime.timezone", value("datetime.timedelta", 0))
CALLBACK = Name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")


WATCHED = """
import sys
from pathlib import Path
from mgq.weights.state_file import read_state

def refuse(event, arguments):
    if event.startswith(("import", "exec", "compile", "os.", "subprocess.", "socket.", "pickle.")):
        raise RuntimeError(f"{event} {arguments}")

path = Path(sys.argv[1])
read_state(path)  # what reading itself imports is there now
before = set(sys.modules)
sys.addaudithook(refuse)
found = list(read_state(path).tensors)
assert set(sys.modules) == before and not {"torch", "pandas", "omegaconf"} & before
print("read", found)
"""


class TestBesideTheWeights:
    @both_formats
    @pytest.mark.parametrize("what", BESIDE)
    def test_it_is_read_past(self, what: str, write: Writer, tmp_path: Path) -> None:
        small = {"stem.weight": np.arange(6, dtype=np.float32)}
        path = written(tmp_path / "w.pth", {"args": BESIDE[what], "state_dict": small, "again": [BESIDE[what]]}, write)
        assert np.array_equal(read_state(path).tensors["stem.weight"], small["stem.weight"])

    def test_nothing_is_imported_or_called_for_it(self, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", {"state_dict": {"stem.weight": np.ones(6, np.float32)}, **BESIDE})
        done = subprocess.run([sys.executable, "-c", WATCHED, path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "read ['stem.weight']\n"), done.stderr

    def test_a_parameter_may_have_attributes_and_a_class(self, tmp_path: Path) -> None:
        forge = Forge()
        array = np.arange(6, dtype=np.float32)
        inner = (forge.storage(array), 0, (6,), (1,), False, Call(ORDERED, ()))
        typed = value("torch._tensor._rebuild_from_type_v2", REBUILD, Name("torch", "Tensor"), inner, {"a": 1})
        kept = value(
            "torch._utils._rebuild_parameter_with_state", forge.tensor(array), True, Call(ORDERED, ()), {"b": 2}
        )
        (tmp_path / "w.pth").write_bytes(forge.zip({"a.weight": typed, "b.weight": kept}))
        found = read_state(tmp_path / "w.pth").tensors
        assert all(np.array_equal(found[name], array) for name in ("a.weight", "b.weight"))

    @pytest.mark.parametrize(
        "name",
        [
            "os.system",
            "builtins.eval",
            "builtins.exec",
            "builtins.type",
            "functools.partial",
            "argparse.FileType",
            "argparse.Namespace.__init__",
            "pathlib.Path.unlink",
            "datetime.sys",
            "collections.namedtuple",
            "torch.load",
            "torch.optimizer.x",
            "someone.settings.Color",
        ],
    )
    def test_whatever_else_is_refused_by_name(self, name: str, tmp_path: Path) -> None:
        small = {"stem.weight": np.ones(2, np.float32)}
        path = written(tmp_path / "w.pth", {"state_dict": small, "x": value(name, "touch ran")})
        with pytest.raises(InputError, match=f"would run code: it asks for '{name}'"):
            read_state(path)

    @pytest.mark.parametrize(
        "call",
        [
            value("builtins.getattr", "text", "upper"),
            value("builtins.getattr", ORDERED, "fromkeys"),
            value("_operator.or_", 1, 2),
            value("builtins.getattr"),
        ],
        ids=repr,
    )
    def test_functions_of_enums_work_on_nothing_else(self, call: Call, tmp_path: Path) -> None:
        small = {"stem.weight": np.ones(2, np.float32)}
        path = written(tmp_path / "w.pth", {"state_dict": small, "x": call})
        with pytest.raises(InputError, match=f"would run code: it asks for '{call.name.module}.{call.name.name}'"):
            read_state(path)

    def test_among_the_weights_it_is_refused_by_name(self, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", {"stem.weight": np.ones(2, np.float32), "args": NAMESPACE})
        with pytest.raises(InputError, match=r"a value of argparse\.Namespace under 'args'"):
            read_state(path)

    def test_an_architecture_that_the_file_names_is_kept(self, tmp_path: Path) -> None:
        small = {"stem.weight": np.ones(2, np.float32)}
        assert read_state(written(tmp_path / "w.pth", {"state_dict": small, "arch": "resnet18"})).arch == "resnet18"


def npz(path: Path) -> bytes:
    np.savez(path.with_suffix(".npz"), a=np.ones(3))
    return path.with_suffix(".npz").read_bytes()


class TestOtherThings:
    """What is no state dict is named, with the line that makes one, or an ONNX file."""

    @pytest.mark.parametrize("name", ["torch.nn.modules.conv.Conv2d", "models.Net", "__main__.Net"])
    def test_a_whole_pickled_model(self, name: str, tmp_path: Path) -> None:
        layer = value("torch.nn.modules.conv.Conv2d", new=True, state={"_parameters": {}})
        model = value(name, new=True, state={"_modules": {"conv": layer}})
        for root in (model, {"epoch": 1, "model": model, "ema": None}):
            message = refusal(written(tmp_path / "w.pt", root))
            assert one_line_about(
                message, "a whole pickled model", "torch.save(model.state_dict()", "torch.onnx.export"
            )

    def test_a_model_of_ultralytics(self, tmp_path: Path) -> None:
        model = value("ultralytics.nn.tasks.ClassificationModel", new=True, state={})
        message = refusal(written(tmp_path / "w.pt", {"model": model}))
        assert one_line_about(message, "a whole pickled model", "yolo export", "format=onnx")

    @pytest.mark.parametrize(
        ("entries", "words"),
        [
            ({"w/data.pkl": pickled({}), "w/constants.pkl": pickled(()), "w/code/x.py": b"x"}, "torch.jit.load"),
            ({"config.json": b"{}", "model.weights.h5": b"x"}, "a Keras model"),
            ({"a.npy": b"x", "b.npy": b"y"}, "numpy arrays"),
            ({"w/models/model.json": b"{}", "w/archive_format": b"pt2"}, "torch.export"),
        ],
        ids=["TorchScript", "Keras", "numpy", "torch.export"],
    )
    def test_archives_of_other_kinds(self, entries: dict[str, bytes], words: str, tmp_path: Path) -> None:
        (tmp_path / "w.pt").write_bytes(zipped(entries, zipfile.ZIP_STORED))
        assert words in refusal(tmp_path / "w.pt")

    @pytest.mark.parametrize(
        ("name", "data", "words"),
        [
            ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "python -m tf2onnx.convert --keras"),
            ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(100), "--tflite"),
            ("saved_model.pb", b"\x08\x01\x12\x99" + bytes(100), "--saved-model"),
            ("model.ckpt-7.data-00000-of-00001", bytes(100), "--saved-model"),
            ("model.pdiparams", bytes(100), "paddle2onnx --model_dir"),
            ("m.caffemodel", b"\x0a\x04" + bytes(100), "is a file of Caffe, which is not read"),
            ("m.MLMODEL", b"\x08\x01" + bytes(100), "is a file of Core ML, which is not read"),
            ("m.engine", bytes(100), "-c model.onnx -d PHOTOS` takes it"),
            ("m.npy", b"\x93NUMPY\x01\0" + bytes(100), "one numpy array"),
            ("m.pth", b"\x08\x08\x12\x07pytorch" + bytes(100), "let its name end in .onnx"),
        ],
    )
    def test_files_of_other_programs(self, name: str, data: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(data)
        assert words in refusal(tmp_path / name)

    def test_a_folder_of_tensorflow(self, tmp_path: Path) -> None:
        (tmp_path / "saved_model.pb").touch()
        assert "--saved-model" in refusal(tmp_path)


def spoiled(state: State, name: str, bad: float) -> State:
    value = state[name].copy()
    value.flat[0] = bad
    return {**state, name: value}


FAULTS = {
    "NaN": ("features.3.conv.0.0.weight", np.nan, "a value that is no number (NaN)"),
    "infinite": ("classifier.1.bias", np.inf, "an infinite value"),
    "minus infinite": ("features.3.conv.0.1.running_mean", -np.inf, "an infinite value"),
    "negative variance": ("features.0.1.running_var", -0.5, "a negative variance (-0.5)"),
    "NaN variance": ("features.0.1.running_var", np.nan, "a value that is no number (NaN)"),
}


def a_copy() -> Classifier:
    """A classifier that may be changed."""
    whole = classifier_of("shufflenet_v1_x0_5_g3")
    return replace(whole, network=copy.deepcopy(whole.network))


class TestNumbersThatCannotBe:
    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("form", ["torch zip", "torch legacy", "safetensors", "megengine pickle", "under a key"])
    def test_they_are_refused_when_they_are_read_by_the_tensors_name(
        self, form: str, fault: str, good: State, other: State, tmp_path: Path
    ) -> None:
        name, bad, words = FAULTS[fault]
        state, path = spoiled(good, name, bad), tmp_path / "w.bin"
        if form == "safetensors":
            save_file(state, str(path))
        elif form == "megengine pickle":
            import megengine

            megengine.save({"state_dict": state}, str(path))
        else:
            root = {"state_dict": other, "state_dict_ema": state} if form == "under a key" else state
            written(path, root, Forge.legacy if form == "torch legacy" else Forge.zip)
        assert one_line_about(refusal(path), f"has {words} in {name}:")

    def test_the_network_that_is_not_taken_may_have_them(self, good: State, other: State, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", {"state_dict": spoiled(other, HEAD, np.nan), "state_dict_ema": good})
        assert is_network(read_weights(path), good)
        assert "(NaN)" in refusal(path, key="state_dict")

    def test_a_number_beyond_float32_is_none_there(self, good: State, tmp_path: Path) -> None:
        wide = {**good, HEAD: spoiled({HEAD: good[HEAD].astype(np.float64)}, HEAD, 1e300)[HEAD]}
        assert "a value beyond float32 (1e+300) in classifier.1.weight" in refusal(written(tmp_path / "w.pth", wide))

    @pytest.mark.parametrize("variance", [0.0, 1e-30, 1e-12])
    def test_variances_of_nothing_and_zero_weights_can_be(self, variance: float, good: State, tmp_path: Path) -> None:
        state = {**good, "features.0.1.running_var": np.full_like(good["features.0.1.running_var"], variance)}
        state |= {"features.1.conv.0.0.weight": state["features.1.conv.0.0.weight"] * 0, HEAD: state[HEAD] * 0}
        state |= {"features.2.conv.0.0.weight": state["features.2.conv.0.0.weight"] * np.float32(1e-12)}
        assert read_weights(written(tmp_path / "w.pth", state)).arch == MOBILE

    def test_a_checkpoint_of_mgq_is_held_to_it(self, tmp_path: Path) -> None:
        classifier = a_copy()
        name, parameter = next(iter(classifier.network.named_parameters()))
        parameter[...] = parameter * np.float32(np.nan)
        path = tmp_path / "c.safetensors"
        classifier.write_checkpoint(path)
        assert one_line_about(refusal(path), f"(NaN) in {name}")

    def test_every_verb_refuses_them_before_it_begins(self, mgq: Mgq, good: State, tmp_path: Path) -> None:
        path = written(tmp_path / "w.pth", spoiled(good, HEAD, np.nan))
        for verb in ("infer", "eval", "calibrate", "analyze", "dump", "train", "qat", "report"):
            assert "(NaN) in classifier.1.weight" in the_error(mgq(verb, "-c", path)), verb

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_onnx_file_is_held_to_it(self, bad: float, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        package.dump(path, arch="efficientnet_lite0", mode="normal")
        model = onnx.load(str(path))
        tensor = next(found for found in model.graph.initializer if len(found.dims) == 4)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] = bad
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, str(path))
        with pytest.raises(InputError) as error:
            open_file(path)
        assert one_line_about(str(error.value), str(path), fault_of(values, False), tensor.name)

    def test_a_megengine_file_is_held_to_it(self, tmp_path: Path) -> None:
        path = tmp_path / "m.megengine"
        classifier = a_copy()
        weight = classifier.network.classifier[0].weight
        raw = np.asarray(weight.numpy(), np.float32).tobytes()
        from mgq.engine.classifier.dump import dump_classifier

        dump_classifier(classifier, path)
        sealed = read_megengine_file(path)
        assert sealed.graph.count(raw) == 1
        graph = sealed.graph.replace(raw, raw[:-4] + np.float32(np.nan).tobytes())
        path.write_bytes(encode_file(graph, sealed.about))
        with pytest.raises(InputError, match=r"a value that is no number \(NaN\)"):
            read_megengine_file(path)


class TestOverflow:
    """Weights that are numbers, and answers that are none."""

    def test_a_layer_that_overflows_is_named_when_weights_are_read(self, good: State, tmp_path: Path) -> None:
        norms = ("features.3.conv.0.1.weight", "features.17.conv.0.1.weight")
        state = {**good, **{name: np.full_like(good[name], 3e38) for name in norms}}
        message = refusal(written(tmp_path / "w.pth", state))
        assert one_line_about(message, "the layer features.3.conv.0", "overflows")

    def test_answers_that_are_no_numbers_are_a_failure_in_a_line(self) -> None:
        classifier = a_copy()
        weight = classifier.network.classifier[0].weight
        weight[...] = weight * np.float32(np.inf)
        with pytest.raises(FailureError, match="not finite"):
            classifier.logits(np.zeros((1, 3, 64, 64), np.uint8))

    def test_calibration_names_the_layer(self) -> None:
        classifier = a_copy()
        scale = classifier.network.first_conv[0].bn.weight
        scale[...] = scale * np.float32(1e38)
        images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
        with pytest.raises(FailureError, match=r"the layer first_conv\.0 gives numbers that are not finite"):
            measure_ranges(classifier.network, [images], "", "", {})

    @pytest.mark.parametrize("name", ["a.onnx", "a.megengine"])
    def test_nothing_is_exported_of_it(self, name: str, tmp_path: Path) -> None:
        from mgq.engine.classifier.dump import dump_classifier

        classifier = a_copy()
        weight = classifier.network.classifier[0].weight
        weight[...] = weight * np.float32(np.inf)
        with pytest.raises(FailureError, match="not finite"):
            dump_classifier(classifier, tmp_path / name)
        assert not list(tmp_path.iterdir())
