"""The training loop: read it top to bottom.

A training is a function of its recipe, its pictures and its first weights: every random choice comes from the seed
and the number of the step, and all that changes is in :meth:`Trainer.state`. So it can be killed at any moment and
goes on to the same weights.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn, TypeVar

import megengine as mge
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor, amp
from megengine.autodiff import GradManager
from megengine.module.batchnorm import _BatchNorm

from mgq.data.loader import Batch, Loader
from mgq.engine.classifier.evaluate import evaluate_loader
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.metrics import Meter
from mgq.engine.classifier.open import versions
from mgq.engine.classifier.runtime_module import int8_runtime
from mgq.engine.distributed.process_group import ProcessGroup, runs_on_processor
from mgq.engine.runs.curves import Mark
from mgq.engine.runs.run_folder import RunFolder
from mgq.engine.runs.training_state import START_AGAIN, TrainingState
from mgq.engine.training.calibrated_start import calibrate
from mgq.engine.training.ema import ModelEma
from mgq.engine.training.linear_probe import fit_linear_probe
from mgq.engine.training.losses import cross_entropy, distillation
from mgq.engine.training.optimizer import head_of, select_parameters, sgd
from mgq.engine.training.recipe import Recipe, to_plain
from mgq.engine.training.schedule import learning_rate
from mgq.errors import InputError, MgqError, printable
from mgq.events import NO_CALLBACKS, Callbacks, Progress
from mgq.ptq.range_measurement import as_input
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat import Phase, plain_qat, prepare_qat, set_phase
from mgq.quantization.qat_layers import observe_weights
from mgq.quantization.targets import get_target
from mgq.runtime.protocol import BatchRuntime, run_in_batches
from mgq.weights.checkpoint import CheckpointInfo, write_checkpoint
from mgq.zoo.network_state import set_state, state_of
from mgq.zoo.weight_loading import load_state

Thing = TypeVar("Thing")

SAVE_SECONDS = 300.0
"""A state to resume from is kept after every epoch, and this often within one."""
REPORT_SECONDS = 0.5
CURVE_SECONDS = 20.0


class StoppedError(MgqError):
    """The training by ``recipe`` was asked to stop. The message says where it stands, and what of it is kept.

    ``verb`` and ``arch`` are those that it goes on with.
    """

    exit_code = 130

    def __init__(self, message: str, recipe: Recipe) -> None:
        super().__init__(message)
        self.verb, self.arch = "qat" if recipe.mode == "qat" else "train", recipe.arch


class Trainer:
    """One training of one network (mode ``normal`` or ``qat``) by one recipe, kept in one folder.

    ``train`` and ``val`` are loaders of the pictures to learn from and to measure on; ``info`` is what the checkpoints
    will say of themselves; ``teacher`` is the float network for distillation; ``examples`` are pictures without
    augmentation on which, before the first step, the classifier is solved or ``network`` calibrated. ``network`` ends
    up as trained; the best one on ``val`` is kept as the run's checkpoint.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: M.Module,
        train: Loader,
        val: Loader,
        run: RunFolder,
        info: CheckpointInfo,
        teacher: M.Module | None = None,
        group: ProcessGroup | None = None,
        callbacks: Callbacks = NO_CALLBACKS,
        report_every: int = 0,
        examples: Loader | None = None,
    ) -> None:
        self.recipe = recipe
        self.network = network
        self.train = train
        self.val = val
        self.run = run
        self.info = info
        self.teacher = teacher
        self.group = group or ProcessGroup()
        self.callbacks = callbacks
        self.report_every = report_every
        self.examples = examples

        self.prepared = False
        self.epoch = 0
        self.step_in_epoch = 0
        self.meter = Meter()
        self.statistics: list[Tensor] = []  # those that training changes
        self.unsaid: list[str] = []  # lines of another process than the first
        self.best: dict[str, float] = {}
        self.start: dict[str, float] = {}  # of a ``qat`` network: calibrated, not trained
        self.seconds = 0.0  # within this epoch, before now
        self.phase: Phase | None = None
        self.average = ModelEma(network, recipe.ema) if recipe.ema else None
        self.parameters = select_parameters(recipe, network)
        trained = list(self.parameters.values())
        numbers = sum(math.prod(parameter._tuple_shape) for parameter in trained)
        callbacks_of_gradients = self.group.gradient_callbacks(recipe.compress, numbers)
        self.manager = GradManager().attach(trained, callbacks=callbacks_of_gradients)
        self.optimizer = sgd(recipe, self.parameters)
        self.scaler = amp.GradScaler() if recipe.amp else None
        self._saved_at = self._reported_at = self._drawn_at = time.monotonic()

    # ---- the loop ----

    def fit(self) -> None:
        """Train until the recipe's last epoch. Raises StoppedError when asked to stop; the state is kept then."""
        self.prepare()
        while self.epoch < self.recipe.epochs:
            self.train_epoch()
            self.finish_epoch()
        self.draw_curves()

    def prepare(self) -> None:
        """What comes before the first step: a new classifier is solved, a ``qat`` network begins with calibration.

        Nothing where that is done. Raises StoppedError as :meth:`fit`.
        """
        if self.prepared:
            return
        self.save()
        if self.recipe.mode == "qat":
            self.begin_with_calibration()
        else:
            self.fit_linear_probe()
        self.group.broadcast(self.network)  # other processors may have rounded otherwise
        if self.average is not None:
            self.average = ModelEma(self.network, self.recipe.ema)
        self.prepared = True
        self.save()

    def fit_linear_probe(self) -> None:
        """Let a new classifier begin with what the weights below it know already."""
        name, examples, smoothing = head_of(self.recipe).removesuffix("."), self.examples, self.recipe.label_smoothing
        if examples is not None:
            self.call_on_first(lambda: fit_linear_probe(self.network, name, examples, smoothing, self.report_alone))

    def observe(self) -> None:
        """Let the observers of a ``qat`` network see some batches before its fake quantization starts."""
        self.network.eval()
        set_phase(self.network, Phase.OBSERVE)
        total = min(self.recipe.observe_batches, len(self.train))
        for number, batch in enumerate(self.train.batches(0), 1):
            self.network(pixels_of(batch.images)).numpy()  # waits, or all batches would lie in memory at once
            self.group.merge_ranges(self.network)
            self.callbacks.on_progress(Progress("observe ranges", number, total, "batches"))
            self.stop_if_asked(keep=False)
            if number == total:
                break

    def begin_with_calibration(self) -> None:
        """Calibrate the float network. What that gives is the first that may be the best.

        Training goes on from there where the recipe has it so, else from the float network: then the observers see some
        batches.
        """
        teacher, examples, target = self.teacher, self.examples, get_target(self.recipe.target)
        assert teacher is not None and examples is not None
        state = self.call_on_first(lambda: calibrate(teacher, examples, self.recipe, self.report_alone))
        calibrated = to_mode(teacher, Mode.QAT, target)
        load_state(calibrated, state, "what calibration found")
        found = self.validate(calibrated)
        self.keep_if_best(0, found, calibrated)
        self.start = figures_of(found)
        if self.recipe.calibrate:
            set_state(self.network, state_of(prepare_qat(calibrated, self.recipe.observer, target)))
        else:
            self.observe()

    def call_on_first(self, work: Callable[[], Thing]) -> Thing:
        """What ``work`` gives in the first process, on all: the others only wait. An MgqError that it raises is raised
        on all."""
        found = self.group.call_on_first(lambda: outcome_of(work))
        if isinstance(found, MgqError):
            raise found
        return self.stop(keep=False) if found is None else found[0]

    def report_alone(self, progress: Progress) -> None:
        """Tell of work that the first process does alone. Raises StoppedError where that is asked to stop."""
        self.callbacks.on_progress(progress)
        if self.callbacks.should_stop():
            self.stop(keep=False)

    def train_epoch(self) -> None:
        started = time.monotonic() - self.seconds
        self.prepare_network()
        for batch in self.train.batches(self.epoch, self.step_in_epoch):
            for problem in batch.problems:
                self.send_message(problem)
            if not self.group.is_first:
                self.unsaid += batch.problems
            self.step(batch)
            self.step_in_epoch += 1
            self.seconds = time.monotonic() - started
            self.report()
            stops, is_due = self.group.from_first((self.callbacks.should_stop(), self.is_save_due()))
            if stops:
                self.stop()
            if is_due and self.step_in_epoch < len(self.train):
                self.save()

    def is_save_due(self) -> bool:
        return time.monotonic() - self._saved_at > SAVE_SECONDS

    def prepare_network(self) -> None:
        """Put the network into training state, and freeze what the recipe freezes at this epoch."""
        self.network.train()
        if self.recipe.freeze_backbone or self.recipe.keep_batch_norm:
            for name, module in self.network.named_modules():
                if isinstance(module, M.BatchNorm2d) and not name.startswith(head_of(self.recipe)):
                    module.eval()
        self.phase = None  # train() has undone it
        self.statistics = running_statistics(self.network)

    def enter_phase(self) -> None:
        """Put a ``qat`` network into the phase that the recipe has for this step."""
        wanted = find_phase(self.recipe, self.epochs_done)
        if self.phase is not wanted:
            self.phase = wanted
            set_phase(self.network, wanted)
            self.statistics = running_statistics(self.network)

    def step(self, batch: Batch) -> None:
        if self.recipe.mode == "qat":
            self.enter_phase()
        # Dropout draws from MegEngine's own generator, which cannot be kept: so it starts anew at every step.
        mge.random.seed(step_seed(self.recipe.seed, self.steps_done, self.group.rank))
        images, labels = pixels_of(batch.images), Tensor(batch.labels.astype(np.int32))
        with self.group.exchanging(self.recipe.sync_bn), self.manager:
            with amp.autocast(enabled=self.recipe.amp):
                logits = self.network(images)
                loss = self.loss(logits, labels, images)
            finish_average = self.group.begin_average([] if self.recipe.sync_bn else self.statistics)
            if self.scaler is None:
                self.manager.backward(loss)
            else:
                self.scaler.backward(self.manager, loss)
        value = float(loss.numpy().item())
        if not math.isfinite(value):
            raise InputError(self.describe_divergence(value))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_factor"]
        self.optimizer.step().clear_grad()
        finish_average()
        if self.average is not None:
            self.average.update(self.network)
        self.meter.add(value, logits.numpy().astype(np.float32), batch.labels)

    def loss(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        own = cross_entropy(logits, labels, self.recipe.label_smoothing)
        if self.teacher is None or not self.recipe.distill:
            return own
        share = self.recipe.distill
        return (1 - share) * own + share * distillation(logits, self.teacher(images).detach())

    @property
    def steps_done(self) -> int:
        return self.epoch * len(self.train) + self.step_in_epoch

    @property
    def epochs_done(self) -> float:
        return self.steps_done / len(self.train)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current step, taken in its middle."""
        return learning_rate(self.recipe, (self.steps_done + 0.5) / len(self.train))

    def describe_divergence(self, value: float) -> str:
        kept = f"{self.run.checkpoint} is the last good one" if self.best else "no checkpoint was written yet"
        return (
            f"the loss became {value} at step {self.steps_done + 1} (epoch {self.epoch + 1}): "
            f"{kept}; start again with a smaller --lr than {self.recipe.lr:g}"
        )

    # ---- the end of an epoch ----

    def finish_epoch(self) -> None:
        """Measure, keep what is best, note the figures, keep the state: in this order, so that a kill in between
        leaves a state from which all of it is done again."""
        entry = self.summarize_epoch()
        if (self.epoch + 1) % self.recipe.val_every == 0 or self.epoch + 1 == self.recipe.epochs:
            found = self.measure(self.epoch + 1)
            entry |= {"val_loss": found.loss, "val_top1": found.top1, "val_top5": found.top5}
        for lines in self.group.gather(self.unsaid)[1:]:
            for line in lines:
                self.send_message(line)
        self.unsaid.clear()
        if self.group.is_first:
            self.run.add_metrics(entry)
        self.send_message(line_of(entry, self.recipe.epochs))
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.meter, self.seconds = Meter(), 0.0
        self.save()
        if time.monotonic() - self._drawn_at > CURVE_SECONDS:
            self.draw_curves()
        self.stop_if_asked(keep=False)

    def summarize_epoch(self) -> dict[str, Any]:
        """What was learned in this epoch, and how fast, by all processes together."""
        meters = self.group.gather(self.meter)
        meter, share = Meter.add_up(meters), len(meters) / self.group.world_size
        entry: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.steps_done,
            "lr": learning_rate(self.recipe, self.epoch + 1 - 0.5 / len(self.train)),
            "loss": meter.loss,
            "top1": meter.top1,
            "images_per_second": meter.images / share / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }
        if self.phase is not None:
            entry["phase"] = self.phase.value
        return entry

    def measure(self, epoch: int) -> Evaluation:
        """Validate, and keep what is the best so far; ``epoch`` counts from 1, 0 is the start."""
        network = self.choose_measured_network()
        found = self.validate(network)
        self.keep_if_best(epoch, found, network)
        return found

    def keep_if_best(self, epoch: int, found: Evaluation, network: M.Module) -> None:
        """Keep ``network`` as the run's checkpoint unless another was better; ``found`` is what it is worth."""
        if not self.is_best(found):
            return
        figures = figures_of(found)
        self.best = {"epoch": epoch, **figures}
        if self.group.is_first:
            info = replace(self.info, step=self.steps_done, metrics=figures)
            write_checkpoint(self.run.checkpoint, standard_state(network, self.recipe.mode), info)

    def validate(self, network: M.Module) -> Evaluation:
        network.eval()
        int8 = self.int8_runtime(network)

        def logits(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            if int8 is not None:
                return run_in_batches(int8, images)
            answer: npt.NDArray[np.float32] = network(pixels_of(images)).numpy()
            return answer

        return evaluate_loader(logits, self.val, "validate", self.callbacks.on_progress, self.group)

    def int8_runtime(self, network: M.Module) -> BatchRuntime | None:
        """A ``qat`` network as real int8 in its target's engine: what counts in the end, and several times as fast.

        None for others, on a GPU, and where the engine is not installed: there the network stands for itself.
        """
        if self.recipe.mode == "qat" and runs_on_processor():
            with contextlib.suppress(InputError):
                return int8_runtime(plain_qat(network), self.recipe.image_size)
        return None

    def choose_measured_network(self) -> M.Module:
        network = self.network if self.average is None else self.average.make_averaged_copy(self.network)
        observe_weights(network)  # they are one step ahead of the ranges that were seen of them
        return network

    def is_best(self, found: Evaluation) -> bool:
        """Whether ``found`` has more right answers than the best epoch, or as many with a smaller loss."""
        if not self.best:
            return True
        return (found.top1, -found.loss) > (self.best["top1"], -self.best["loss"])

    # ---- what is kept ----

    def state(self, meter: Meter | None = None) -> TrainingState:
        """All that this training needs to go on to the bit; ``meter``: that of all processes."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, value in state_of(self.network).items():
            tensors[f"network.{name}"] = value
        for name, parameter in self.parameters.items():
            tensors[f"velocity.{name}"] = self.optimizer._state[parameter]["momentum_buffer"].numpy()
        progress: dict[str, Any] = {
            "prepared": self.prepared,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "meter": (meter or self.meter).state(),
            "best": self.best,
            "start": self.start,
            "seconds": self.seconds,
            "pictures": self.count_images(),
            "info": asdict(self.info),
        }
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
            progress["average_steps"] = self.average.steps
        if self.scaler is not None:
            progress["scale"] = self.scaler.scale_factor
        return TrainingState(tensors, progress, to_plain(self.recipe), versions())

    def count_images(self) -> list[int]:
        """Those to learn from, and those to measure on."""
        return [len(self.train.dataset), len(self.val.dataset)]

    def load(self, state: TrainingState) -> None:
        """Go on from ``state``. Raises InputError where it belongs to other pictures, or to another training."""
        was, now = state.progress["pictures"], self.count_images()
        if was != now:
            raise InputError(
                f"{self.recipe.data} had {was[0]} + {was[1]} pictures when this run began and has {now[0]} + {now[1]} "
                "now: put them back, or start a new run without --resume"
            )
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, OverflowError, RuntimeError):
            raise InputError(f"{printable(self.run.last)} does not fit this training; {START_AGAIN}") from None

    def _take(self, state: TrainingState) -> None:
        parts: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for name, value in state.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        set_state(self.network, parts["network"])
        for name, parameter in self.parameters.items():
            self.optimizer._state[parameter]["momentum_buffer"][...] = Tensor(parts["velocity"][name])
        self.prepared = state.progress.get("prepared", True)
        self.epoch = state.progress["epoch"]
        self.step_in_epoch = state.progress["step_in_epoch"]
        if self.group.is_first:
            self.meter = Meter.from_state(state.progress["meter"])
        self.best = dict(state.progress["best"])
        self.start = dict(state.progress.get("start", {}))
        self.seconds = state.progress["seconds"]
        if self.average is not None:
            self.average.load(parts["average"], state.progress["average_steps"])
        if self.scaler is not None:
            self.scaler.scale_factor = state.progress["scale"]

    def save(self) -> None:
        meter = Meter.add_up(self.group.gather(self.meter))
        if self.group.is_first:
            self.run.write_state(self.state(meter))
        self._saved_at = time.monotonic()

    # ---- progress and messages ----

    def report(self) -> None:
        """Tell of a step that was done: now and then how far the epoch is, and the line that was asked for."""
        if time.monotonic() - self._reported_at > REPORT_SECONDS or self.step_in_epoch == len(self.train):
            self.report_progress()
        if self.report_every and self.step_in_epoch % self.report_every == 0:
            self.send_message(
                f"epoch {self.epoch + 1} step {self.step_in_epoch}/{len(self.train)}  lr {self.learning_rate:.3g}  "
                f"loss {self.meter.loss:.3f}  top-1 {self.meter.top1:.1f} %"
            )

    def report_progress(self) -> None:
        self._reported_at = time.monotonic()
        images_a_step = self.train.batch_size * self.group.world_size
        done, total = self.step_in_epoch * images_a_step, len(self.train) * images_a_step
        self.group.note_progress(self.step_in_epoch, self.seconds)
        ranks = self.group.describe()
        detail = f"loss {self.meter.loss:.3f}, top-1 {self.meter.top1:.1f} %{ranks and ', '}{ranks}"
        what = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        self.callbacks.on_progress(Progress(what, done, total, "pictures", detail))

    def send_message(self, line: str) -> None:
        if self.group.is_first:
            self.run.log(line)
            self.callbacks.on_message(line)

    def stop_if_asked(self, keep: bool = True) -> None:
        if self.group.from_first(self.callbacks.should_stop()):
            self.stop(keep)

    def stop(self, keep: bool = True) -> NoReturn:
        if keep:
            self.save()
        step = f", step {self.step_in_epoch} of {len(self.train)}" if self.step_in_epoch else ""
        where = f"stopped in epoch {min(self.epoch + 1, self.recipe.epochs)} of {self.recipe.epochs}{step}"
        raise StoppedError(f"{where}; all of it is kept", self.recipe)

    def draw_curves(self) -> None:
        if self.group.is_first:
            problem = self.run.write_curves(f"{self.recipe.arch}, mode {self.recipe.mode}", marks(self.recipe))
            if problem is not None:
                self.send_message(problem)
        self._drawn_at = time.monotonic()


def outcome_of(work: Callable[[], Thing]) -> tuple[Thing] | MgqError | None:
    """What ``work`` gives, or the error that it raises; None where it was stopped. It can be pickled."""
    try:
        return (work(),)
    except StoppedError:
        return None
    except MgqError as error:
        return error


def figures_of(found: Evaluation) -> dict[str, float]:
    """What is kept of an evaluation: percent, and nats."""
    return {"top1": found.top1, "top5": found.top5, "loss": found.loss}


def standard_state(network: M.Module, mode: str) -> dict[str, npt.NDArray[Any]]:
    """The state that a checkpoint holds: that of a ``qat`` network in the form that every verb loads."""
    return state_of(plain_qat(network) if mode == "qat" else network)


def running_statistics(network: M.Module) -> list[Tensor]:
    """Means and variances of the batch norms in training state."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]


def find_phase(recipe: Recipe, epoch: float) -> Phase:
    """What quantization-aware training keeps still at ``epoch``, which counts from 0."""
    if recipe.calibrate or epoch >= recipe.freeze_observers > 0:
        return Phase.FREEZE_OBSERVERS
    return Phase.FREEZE_BATCH_NORM if epoch >= recipe.freeze_batch_norm > 0 else Phase.QUANTIZE


def marks(recipe: Recipe) -> list[Mark]:
    """The epochs at which the schedule changes permanently, for the curves."""
    if recipe.mode != "qat" or recipe.calibrate:
        return []
    found = [(recipe.freeze_batch_norm, "batch norm frozen"), (recipe.freeze_observers, "observers frozen")]
    return [Mark(epoch, text) for epoch, text in found if 0 < epoch < recipe.epochs]


def pixels_of(images: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 (N, 3, H, W) as networks take it: float32, minus 128."""
    return Tensor(as_input(images))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for each step and rank, well apart from its neighbours' (splitmix64's finalizer, Steele et al. 2014)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank + 1) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) % 2**31


def line_of(entry: Mapping[str, Any], epochs: int) -> str:
    """A finished epoch in one line."""
    line = f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.3f}  train {entry['top1']:.1f} %"
    if "val_top1" in entry:
        line += f"  val {entry['val_top1']:.1f} %"
    return f"{line}  {entry['images_per_second']:.1f} pictures/s"
