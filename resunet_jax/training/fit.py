"""The one training loop, for every task."""

import json
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resunet_jax.config import Config
from resunet_jax.data.pipeline import SliceSource, eval_batches, train_batches
from resunet_jax.errors import InputError
from resunet_jax.evaluation.metrics import HARD_METRICS, hard_metrics
from resunet_jax.files import write_text
from resunet_jax.progress import logger, progress
from resunet_jax.training.checkpoints import Checkpoints, History, LoadedModel
from resunet_jax.training.steps import (
    TrainState,
    compiler_options,
    create_state,
    frozen_lung,
    make_eval_step,
    make_optimizer,
    make_train_step,
)

METRICS = "metrics.jsonl"
"""File of a workdir with one JSON record an epoch."""

_STEPS_AHEAD = 2  # how far the host may run before the device; enough to keep it busy


def fit(
    config: Config, train: SliceSource, val: SliceSource | None, workdir: Path, lung: LoadedModel | None = None
) -> History:
    """Trains until `epochs` or `patience` ends it, from where the workdir's latest checkpoint left off.

    Args:
      config: of the run.
      train: slices to learn from.
      val: slices whose loss chooses the best checkpoint and ends the training; None trains all `epochs` and keeps the
        last.
      workdir: gets checkpoints/ and metrics.jsonl.
      lung: the frozen lung model, for task "infection".

    Returns:
      one record an epoch. "val_loss" and the counts are pooled over all validation slices, and None without them. Of
        the "seconds" of the training steps the host waited "data_wait_seconds" for batches; the device, no longer.

    Raises:
      InputError: the loss is not finite; the last good checkpoint stays.
    """
    steps_per_epoch = math.ceil(len(train) / config.train.batch_size)
    optimizer = make_optimizer(config, steps_per_epoch)
    frozen = frozen_lung(lung.config) if lung else None
    train_step = jax.jit(
        make_train_step(config, optimizer, frozen), donate_argnums=0, compiler_options=compiler_options()
    )
    eval_step = jax.jit(make_eval_step(config, frozen))
    lung_variables = lung.variables if lung else None
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)

    device = jax.devices()[0]
    # Committed to the device like the batches; otherwise the second step would compile again.
    state = jax.device_put(create_state(config, optimizer), device)
    batches = train_batches(train, config.train.batch_size, config.train.seed, device)
    history: History = []
    try:
        with Checkpoints(workdir) as checkpoints:
            if restored := checkpoints.restore_latest(state, batches):
                state, history = restored
                logger.info("resuming after epoch %d", len(history))
            write_history(workdir, history)
            while not finished(config, history):
                epoch, start = len(history) + 1, time.monotonic()
                step = partial(train_step, key=key, lung_variables=lung_variables)
                state, losses, counts, waited = _train_epoch(step, state, batches, steps_per_epoch, epoch)
                seconds = time.monotonic() - start
                validation = (
                    _validate(eval_step, state.variables, val, config.train.batch_size, lung_variables) if val else {}
                )
                record = {
                    "epoch": epoch,
                    "step": int(state.step),
                    "train_loss": float(np.mean(losses)),
                    "val_loss": None,
                    **{f"train_{name}": value for name, value in hard_metrics(counts).items()},
                    **dict.fromkeys((f"val_{name}" for name in HARD_METRICS), None),
                    **{f"val_{name}": value for name, value in validation.items()},
                    "seconds": round(seconds, 3),
                    "steps_per_second": round(steps_per_epoch / seconds, 3),
                    "data_wait_seconds": round(waited, 3),
                }
                if val:
                    _refuse_non_finite(validation["loss"], f"validation of epoch {epoch}")
                history.append(_without_nan(record))
                checkpoints.save(state, batches, config, history)
                write_history(workdir, history)
                logger.info(_summary(config, record))
    finally:
        batches.close()
    return history


def finished(config: Config, history: History) -> bool:
    """Whether `epochs` are done, or the validation loss has not fallen for `patience` epochs."""
    if len(history) >= config.train.epochs:
        return True
    losses = [record["val_loss"] for record in history]
    if None in losses:
        return False
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= config.train.patience


def write_history(workdir: Path, history: History) -> None:
    """Writes metrics.jsonl anew, whole: the history in the checkpoint is the truth, this its readable copy."""
    write_text(workdir / METRICS, "".join(json.dumps(record) + "\n" for record in history))


def evaluate_sums(
    eval_step: Any, variables: Any, source: SliceSource, batch_size: int, lung_variables: Any
) -> dict[str, float]:
    """What `eval_step` returns, added up over all slices."""
    sums = [eval_step(variables, batch, lung_variables) for batch in eval_batches(source, batch_size)]
    return _add_up(sums)


def _validate(
    eval_step: Any, variables: Any, source: SliceSource, batch_size: int, lung_variables: Any
) -> dict[str, float]:
    sums = evaluate_sums(eval_step, variables, source, batch_size, lung_variables)
    return {"loss": sums["loss"] / sums["slices"], **hard_metrics(sums)}


def _train_epoch(
    step: Any, state: TrainState, batches: Any, steps: int, epoch: int
) -> tuple[TrainState, list[float], dict[str, float], float]:
    """The state after an epoch, each step's loss, the counts, and for how many seconds the host waited for data."""
    pending: list[dict[str, jax.Array]] = []
    first, waited = int(state.step), 0.0
    with progress(f"epoch {epoch}", steps) as advance:
        for _ in range(steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            state, metrics = step(state, batch)
            pending.append(metrics)
            if len(pending) > _STEPS_AHEAD:
                jax.block_until_ready(pending[-1 - _STEPS_AHEAD])
            advance("")
    losses = [float(metrics["loss"]) for metrics in jax.device_get(pending)]
    for offset, loss in enumerate(losses):
        _refuse_non_finite(loss, f"step {first + offset + 1} (epoch {epoch})")
    return state, losses, _add_up(pending), waited


def _add_up(sums: list[dict[str, jax.Array]]) -> dict[str, float]:
    fetched: list[Mapping[str, Any]] = jax.device_get(sums)
    return {name: float(sum(np.float64(values[name]) for values in fetched)) for name in fetched[0]}


def _refuse_non_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at {where}; the last good checkpoint is untouched. "
            "Try a lower --learning_rate in a new --workdir"
        )


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """NaN, which JSON does not have, as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _summary(config: Config, record: dict[str, Any]) -> str:
    shown = {"train loss": "train_loss", "val loss": "val_loss", "val Dice": "val_dice"}
    numbers = "".join(f"{label} {record[name]:.4f}, " for label, name in shown.items() if record[name] is not None)
    return f"epoch {record['epoch']}/{config.train.epochs}: {numbers}{record['steps_per_second']:.2f} steps/s"
