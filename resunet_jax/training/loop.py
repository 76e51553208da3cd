"""The one training loop, for every task."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from resunet_jax.config import Config
from resunet_jax.data.batches import Batch, ProcessShard, SliceSource, eval_batches, train_batches
from resunet_jax.errors import InputError, StoppedError
from resunet_jax.files import without_nan, write_text
from resunet_jax.metrics.overlap import HARD_METRICS, hard_metrics
from resunet_jax.model.build import ARCHITECTURES, Architecture
from resunet_jax.model.resunet import Variables
from resunet_jax.progress import logger, progress
from resunet_jax.training.augment import AUGMENTATIONS, Augmentation
from resunet_jax.training.checkpoints import Checkpoints
from resunet_jax.training.devices import is_primary, make_mesh, process_shard, replicate, replicated
from resunet_jax.training.losses import LOSSES, Loss, make_loss
from resunet_jax.training.step import (
    TrainState,
    create_state,
    frozen_lung,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from resunet_jax.weights.store import History, LoadedModel

METRICS_FILE = "metrics.jsonl"
"""File of a workdir with one JSON record per epoch."""

_STEPS_AHEAD = 2  # how far the host may run before the device; enough to keep it busy
_STEPS_BETWEEN_FETCHES = 50  # of the metrics; a loss that is not finite is found then

_EVAL_STEPS_AHEAD = 4  # how many validation batches may wait on the device

_MAX_SKIPPED = 10  # steps in a row; more will not end by themselves


@dataclasses.dataclass
class EpochTotals:
    """What the steps of an epoch add up to; JSON values, so that a stopped epoch can be resumed.

    Attributes:
      losses: of each step; None where the step was left out because it was not finite.
      counts: hard counts in pixels, see `confusion_counts`.
      seconds: spent in steps.
      data_wait_seconds: of these, how long the host waited for batches.
    """

    losses: list[float | None] = dataclasses.field(default_factory=list)
    counts: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(("tp", "fp", "fn", "tn"), 0.0))
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Over the steps that were not left out."""
        kept = [loss for loss in self.losses if loss is not None]
        return float(np.mean(kept)) if kept else math.nan


def never_stop(step: int) -> bool:
    """Does not stop a training."""
    return False


def ignore_epoch(record: dict[str, Any]) -> None:
    """Does nothing with an epoch's record."""


def fit(
    config: Config,
    train: SliceSource,
    val: SliceSource | None,
    workdir: Path,
    lung: LoadedModel | None = None,
    *,
    initial: LoadedModel | None = None,
    mesh: Mesh | None = None,
    should_stop: Callable[[int], bool] = never_stop,
    on_epoch: Callable[[dict[str, Any]], None] = ignore_epoch,
    losses: Mapping[str, Loss] = LOSSES,
    augmentations: Mapping[str, Augmentation] = AUGMENTATIONS,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> History:
    """Trains for `epochs`, or with schedule "step" until `patience` ends it, from the workdir's latest checkpoint on.

    Args:
      config: of the run.
      train: slices to learn from.
      val: slices whose loss chooses the best checkpoint and ends the training; None trains all `epochs` and keeps the
        last.
      workdir: gets checkpoints/ and metrics.jsonl.
      lung: the frozen lung model, for task "infection".
      initial: a trained model to begin with, see `create_state`.
      mesh: the devices, see `make_mesh`; by default one.
      should_stop: asked after each step with its number; True saves the state and ends the training.
      on_epoch: called with each epoch's record, those from before a resumption first; of several processes, by one.
      losses: the table of loss terms.
      augmentations: the table of transforms.
      architectures: the table of models.

    Returns:
      one record per epoch. "val_loss" is formed once, from sums over all validation slices, as the counts are; both
        are None without validation slices. Of the "seconds" of the training steps the host waited "data_wait_seconds"
        for batches; the device, no longer.

    Raises:
      InputError: a loss or gradient is not finite, or a checkpoint cannot be written; the last good checkpoint stays.
        Or there are fewer steps than `accumulate_steps`, so that nothing would be learned.
      StoppedError: `should_stop` said so; the same call resumes there.
    """
    mesh = mesh or make_mesh(1, config.train.batch_size)
    share = process_shard(mesh)
    steps_per_epoch = _steps_per_epoch(config, len(train))
    optimizer = make_optimizer(config, steps_per_epoch)
    train_step, eval_step = _jitted_steps(config, optimizer, lung, mesh, losses, augmentations, architectures)
    loss = make_loss(config.train.loss, losses)

    def validate(variables: Variables) -> dict[str, float] | None:
        if val is None:
            return None
        sums = evaluate_sums(eval_step, variables, eval_batches(val, config.train.batch_size, share))
        return {"loss": float(loss.value(sums["loss"])), **hard_metrics(sums)}

    given = [model.variables if model else None for model in (lung, initial)]
    state = create_state(config, optimizer, architectures, *given)
    with Checkpoints(workdir) as checkpoints:
        state, history, totals = _resume(checkpoints, state)
        write_history(workdir, history)
        report = on_epoch if is_primary() else ignore_epoch
        for record in history:
            report(record)
        # Committed to the devices like the batches; otherwise the second step would compile again.
        state = replicate(state, mesh)
        batches = train_batches(train, config.train.batch_size, config.train.seed, share, int(state.step))
        run = _EpochRunner(config, train, steps_per_epoch, train_step)
        try:
            while not finished(config, history):
                state, stop = run.epoch(state, batches, totals, should_stop)
                stopped = f"{workdir}: stopped after step {state.step}; the same command resumes there"
                if len(totals.losses) < steps_per_epoch:
                    checkpoints.save(state, config, history, dataclasses.asdict(totals))
                    raise StoppedError(stopped)
                history.append(run.record(state, totals, validate(state.model_variables)))
                checkpoints.save(state, config, history, None)
                write_history(workdir, history)
                report(history[-1])
                logger.info(_summary(config, history[-1]))
                totals = EpochTotals()
                if stop and not finished(config, history):
                    raise StoppedError(stopped)
        finally:
            batches.close()
    return history


def _steps_per_epoch(config: Config, slices: int) -> int:
    """Refuses a training that is too short for one update."""
    steps = math.ceil(slices / config.train.batch_size)
    if config.train.epochs * steps < config.train.accumulate_steps:
        raise InputError(
            f"accumulate_steps is {config.train.accumulate_steps}, and the whole training has "
            f"{config.train.epochs * steps} steps: no update would be made; lower it, or raise `epochs`"
        )
    return steps


def _resume(checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, History, EpochTotals]:
    """The state, the whole epochs and what there is of the next one; by the latest checkpoint, where there is one."""
    saved = checkpoints.restore_latest(state)
    if saved is None:
        return state, [], EpochTotals()
    totals = EpochTotals(**saved.partial_epoch or {})
    logger.info("resuming after epoch %d%s", len(saved.history), f", step {saved.state.step}" if totals.losses else "")
    return saved.state, saved.history, totals


def _jitted_steps(
    config: Config,
    optimizer: optax.GradientTransformation,
    lung: LoadedModel | None,
    mesh: Mesh,
    losses: Mapping[str, Loss],
    augmentations: Mapping[str, Augmentation],
    architectures: Mapping[str, Architecture],
) -> tuple[
    Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]], Callable[[Variables, Batch], dict[str, Any]]
]:
    """The training step, which donates the state, and the evaluation step, with key and lung model bound."""
    on_each = replicated(mesh)
    frozen = frozen_lung(lung.config, architectures) if lung else None
    train_step = make_train_step(
        config, optimizer, frozen, losses=losses, augmentations=augmentations, architectures=architectures
    )
    eval_step = make_eval_step(config, frozen, losses=losses, architectures=architectures)
    key = jax.jit(lambda: jax.random.fold_in(jax.random.key(config.train.seed), 1), out_shardings=on_each)()
    lung_variables = replicate(lung.variables, mesh) if lung else None
    return (
        partial(jax.jit(train_step, donate_argnums=0, out_shardings=on_each), key=key, lung_variables=lung_variables),
        partial(jax.jit(eval_step, out_shardings=on_each), lung_variables=lung_variables),
    )


class _EpochRunner(NamedTuple):
    """What does not change from epoch to epoch."""

    config: Config
    train: SliceSource
    steps_per_epoch: int
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

    def epoch(
        self, state: TrainState, batches: Any, totals: EpochTotals, should_stop: Callable[[int], bool]
    ) -> tuple[TrainState, bool]:
        """Takes the steps that `totals` lacks of an epoch, or some of them if asked to stop, and adds them to it.

        Returns:
          the state, and whether it was asked to stop, perhaps at the last step.
        """
        start, first = time.monotonic(), int(state.step) - len(totals.losses)
        before, stop = totals.seconds, False
        pending: list[dict[str, jax.Array]] = []
        steps = range(len(totals.losses), self.steps_per_epoch)
        with progress(f"epoch {first // self.steps_per_epoch + 1}", len(steps)) as advance:
            for i in steps:
                asked = time.monotonic()
                batch = next(batches)
                totals.data_wait_seconds += time.monotonic() - asked
                state, metrics = self.step(state, batch)
                pending.append(metrics)
                if len(pending) > _STEPS_AHEAD:
                    jax.block_until_ready(pending[-1 - _STEPS_AHEAD])
                stop = should_stop(first + i + 1)
                if stop or i == steps[-1] or len(pending) == _STEPS_BETWEEN_FETCHES:
                    self._add(pending, totals, first)
                    pending = []
                advance("")
                if stop:
                    break
        totals.seconds = before + time.monotonic() - start
        return state, stop

    def record(self, state: TrainState, totals: EpochTotals, validation: Mapping[str, float] | None) -> dict[str, Any]:
        """An epoch's line of metrics.jsonl."""
        epoch = int(state.step) // self.steps_per_epoch
        if validation and not math.isfinite(validation["loss"]):
            raise self._not_finite(f"the loss is {validation['loss']} in validation after epoch {epoch}", state.step)
        values = {
            "epoch": epoch,
            "step": int(state.step),
            "train_loss": totals.mean_loss,
            "val_loss": None,
            **{f"train_{name}": value for name, value in hard_metrics(totals.counts).items()},
            **dict.fromkeys((f"val_{name}" for name in HARD_METRICS), None),
            **{f"val_{name}": value for name, value in (validation or {}).items()},
            "skipped_steps": totals.losses.count(None),
            "seconds": round(totals.seconds, 3),
            "steps_per_second": round(self.steps_per_epoch / totals.seconds, 3),
            "data_wait_seconds": round(totals.data_wait_seconds, 3),
        }
        return without_nan(values)

    def _add(self, pending: list[dict[str, jax.Array]], totals: EpochTotals, first: int) -> None:
        """Fetches what steps returned; `first` is the step before the epoch."""
        for metrics in jax.device_get(pending):
            finite, step = bool(metrics["finite"]), first + len(totals.losses) + 1
            totals.losses.append(float(metrics["loss"]) if finite else None)
            for name in totals.counts:
                totals.counts[name] += float(metrics[name])
            if not finite and not self.config.train.skip_nonfinite:
                loss = float(metrics["loss"])
                what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
                raise self._not_finite(
                    f"{what} at step {step}, in one of {self._slices(step - 1)}",
                    step - 1,
                    "look at these slices, leave such steps out with `skip_nonfinite`, or ",
                )
            limit = min(_MAX_SKIPPED, self.steps_per_epoch)
            if totals.losses[-limit:] == [None] * limit:
                raise self._not_finite(f"{limit} steps in a row were not finite, up to step {step}", step - 1)

    def _slices(self, number: int) -> str:
        """The names of the slices of a batch, counted from 0."""
        train = self.config.train
        batches = train_batches(self.train, train.batch_size, train.seed, ProcessShard(lambda batch: batch), number)
        index = next(batches)["index"]
        batches.close()
        return ", ".join(self.train.names(index))

    def _not_finite(self, what: str, step: Any, remedies: str = "") -> InputError:
        updates = int(step) // self.config.train.accumulate_steps
        rate = float(make_schedule(self.config, self.steps_per_epoch)(updates))
        return InputError(
            f"{what} (learning rate {rate:g}); the last good checkpoint is untouched; {remedies}try a lower "
            "`learning_rate` in a new `workdir`"
        )


def finished(config: Config, history: History) -> bool:
    """Whether `epochs` are done or, but for "one_cycle", the validation loss has not fallen for `patience` epochs."""
    if len(history) >= config.train.epochs or config.train.schedule == "one_cycle":
        return len(history) >= config.train.epochs
    losses = [record["val_loss"] for record in history]
    if None in losses:
        return False
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= config.train.patience


def write_history(workdir: Path, history: History) -> None:
    """Writes metrics.jsonl anew, whole: the history in the checkpoint is the truth, this its readable copy."""
    if is_primary():
        write_text(workdir / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in history))


def epochs_done(workdir: Path) -> int:
    """Of a run that was begun: the lines of its metrics.jsonl."""
    file = workdir / METRICS_FILE
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def evaluate_sums(step: Callable[[Variables, Batch], Any], variables: Variables, batches: Any) -> dict[str, Any]:
    """What an evaluation step returns, added up over batches in double precision."""
    sums: list[Any] = []
    for batch in batches:
        sums.append(step(variables, batch))
        if len(sums) > _EVAL_STEPS_AHEAD:
            jax.block_until_ready(sums[-1 - _EVAL_STEPS_AHEAD])
    fetched = jax.device_get(sums)
    return jax.tree.map(lambda *values: float(sum(map(np.float64, values))), *fetched)


def _summary(config: Config, record: dict[str, Any]) -> str:
    shown = {"train loss": "train_loss", "val loss": "val_loss", "val Dice": "val_dice"}
    numbers = "".join(f"{label} {record[name]:.4f}, " for label, name in shown.items() if record[name] is not None)
    return f"epoch {record['epoch']}/{config.train.epochs}: {numbers}{record['steps_per_second']:.2f} steps/s"
