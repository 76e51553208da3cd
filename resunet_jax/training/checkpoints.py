"""Checkpoints of a training run: the best and the two latest."""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from resunet_jax.config import Config, to_dict
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import is_leftover, make_output_dir
from resunet_jax.progress import logger
from resunet_jax.training.devices import barrier, is_primary
from resunet_jax.training.step import TrainState
from resunet_jax.weights.store import (
    CHECKPOINTS,
    CONFIG_FILE,
    DIGESTS_FILE,
    HISTORY_FILE,
    VARIABLES,
    CorruptCheckpointError,
    History,
    best_step,
    checkpoint_steps,
    read_values,
    restore_tree,
    verify_folder,
    write_folder,
)

_OPTIMIZER = "optimizer"
_DELETED = ".deleted"
_DAMAGED = "damaged_checkpoints"


class RestoredState(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      state: of the training.
      history: one record for each whole epoch so far.
      partial_epoch: the totals of an epoch that was stopped half-way, or None.
    """

    state: TrainState
    history: History
    partial_epoch: dict[str, Any] | None


class Checkpoints:
    """Writes and reads the checkpoints of one workdir: the best (see `selection_loss`) and the two latest.

    Use as a context manager: what is being written when it ends is finished. Of several processes one writes.
    """

    def __init__(self, workdir: Path) -> None:
        """Makes the folder, and removes what a killed process left in it."""
        self._workdir = workdir
        self._folder = workdir / CHECKPOINTS
        self._executor = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        if is_primary():
            make_output_dir(self._folder)
            for path in self._folder.iterdir():
                if path.name == _DELETED or is_leftover(path):
                    shutil.rmtree(path, ignore_errors=True)
        barrier("folder of checkpoints")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._executor:
            self._wait()
        if kind is None:
            barrier("last checkpoint written")

    def save(
        self, state: TrainState, config: Config, history: History, partial_epoch: Mapping[str, Any] | None
    ) -> None:
        """Saves everything that a run needs to resume; returns before it is on disk.

        Args:
          state: after the last epoch of `history`, or within the next.
          config: of the run.
          history: all whole epochs so far; the one of least `selection_loss`, which is finite, is the best.
          partial_epoch: JSON values to resume within an epoch, or None between epochs.

        Raises:
          InputError: the checkpoint before could not be written.
        """
        self._wait()
        if not is_primary():
            return
        step = int(state.step)
        trees = {VARIABLES: state.model_variables, _OPTIMIZER: _optimizer(state)}
        trees = jax.tree.map(np.array, jax.device_get(trees))  # a copy: the next step overwrites the state
        values = {CONFIG_FILE: to_dict(config), HISTORY_FILE: {"epochs": list(history), "unfinished": partial_epoch}}
        there = checkpoint_steps(self._folder)
        keep = {step, *there[-1:], *best_step([record for record in history if record["step"] in (*there, step)])}
        self._writing = self._executor.submit(self._write, step, trees, values, keep)

    def restore_latest(self, state: TrainState) -> RestoredState | None:
        """The latest good checkpoint, or None where nothing was saved.

        A damaged one is named, and moved to the workdir's folder damaged_checkpoints/. `state` is of the same shapes.

        Raises:
          InputError: there are checkpoints, and none is good.
        """
        steps, damaged = checkpoint_steps(self._folder), []
        for step in steps:
            try:
                verify_folder(self._folder / str(step))
            except CorruptCheckpointError as error:
                damaged.append(step)
                logger.warning("%s; it is left out", error)
        good = [step for step in steps if step not in damaged]
        if damaged and not good:
            raise InputError(f"{self._workdir}: none of its checkpoints is good; choose a new `workdir`")
        self._quarantine(damaged)
        if not good:
            return None
        if damaged:
            logger.warning("resuming from the checkpoint of step %d", good[-1])
        return _read(self._folder / str(good[-1]), state)

    def _write(self, step: int, trees: Mapping[str, Any], values: Mapping[str, Any], keep: set[int]) -> None:
        write_folder(self._folder / str(step), trees, values)
        for old in checkpoint_steps(self._folder):
            if old not in keep:  # renamed before it is deleted, or a kill would leave half of one
                (self._folder / str(old)).rename(self._folder / _DELETED)
                shutil.rmtree(self._folder / _DELETED)

    def _wait(self) -> None:
        """Waits until the last checkpoint is written, and raises what prevented it."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except Exception as error:  # orbax and TensorStore have no common base for it
            raise InputError(
                f"{self._folder}: the checkpoint cannot be written ({first_line(error)}); the last good one is "
                "untouched. Free the disk or fix the permissions; the same command resumes"
            ) from error

    def _quarantine(self, steps: Sequence[int]) -> None:
        """Out of the way of the checkpoints to come, of which some have the same names."""
        barrier("checkpoints verified")
        for step in steps if is_primary() else ():
            target = self._workdir / _DAMAGED / str(step)
            shutil.rmtree(target, ignore_errors=True)
            make_output_dir(target.parent)
            (self._folder / str(step)).rename(target)
        barrier("damaged checkpoints quarantined")


def _optimizer(state: TrainState) -> dict[str, Any]:
    """What a training needs besides the model; the variables too, where the model is their average."""
    variables = {} if state.average is None else {"variables": state.variables}
    return {"step": state.step, "state": state.opt_state, **variables}


def _read(folder: Path, state: TrainState) -> RestoredState:
    """A checkpoint that is as it was written."""
    if not (folder / DIGESTS_FILE).is_file():
        raise InputError(
            f"{folder}: was written by resunet_jax 0.1.0 and cannot be verified; it can be evaluated, but not "
            "resumed: choose a new `workdir`"
        )
    history = read_values(folder, HISTORY_FILE)
    model = restore_tree(folder / VARIABLES, state.variables)
    optimizer = restore_tree(folder / _OPTIMIZER, _optimizer(state))
    average = None if state.average is None else model
    restored = TrainState(optimizer["step"], optimizer.get("variables", model), optimizer["state"], average)
    return RestoredState(restored, history["epochs"], history["unfinished"])
