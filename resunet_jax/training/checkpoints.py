"""Checkpoints of a training run, and models restored from nothing but their folder.

A model's folder holds config.json, variables/ (by orbax) and files.json, the SHA-256 of every file in it; that of a
checkpoint holds optimizer/ and history.json too. It appears whole or not at all, and is compared with files.json before
it is used.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from resunet_jax.config import Config, from_dict, to_dict
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import make_output_dir, whole_folder, write_text
from resunet_jax.model.resunet import ResUnet, Variables
from resunet_jax.progress import logger
from resunet_jax.training.devices import is_primary, wait_for_all
from resunet_jax.training.steps import TrainState
from resunet_jax.training.tasks import TASKS, build_model

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds its checkpoints, each in a folder with the number of its step."""

THRESHOLD_FILE = "threshold.json"
"""File of a workdir with the threshold chosen on its validation cases."""

_CONFIG = "config.json"
_HISTORY = "history.json"
_FILES = "files.json"
_VARIABLES = "variables"
_OPTIMIZER = "optimizer"
_DELETED = ".deleted"
_DAMAGED = "damaged_checkpoints"

History = list[dict[str, Any]]
"""One record an epoch, as in metrics.jsonl."""


class LoadedModel(NamedTuple):
    """A restored model.

    Attributes:
      model: the module.
      variables: {"params": ..., "batch_stats": ...}.
      config: how it was made and how it is to be used.
    """

    model: ResUnet
    variables: Variables
    config: Config


def rank(record: dict[str, Any]) -> float:
    """What the best checkpoint has least of: the validation loss; without one, a later epoch is better."""
    return float(-record["epoch"] if record["val_loss"] is None else record["val_loss"])


class Saved(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      state: of the training.
      history: one record for each whole epoch so far.
      unfinished: what an epoch that was stopped half-way has summed up, or None.
    """

    state: TrainState
    history: History
    unfinished: dict[str, Any] | None


class _DamagedError(Exception):
    """A folder is not as it was written; the message names it and says what of it."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"{folder}: damaged ({what})")


class Checkpoints:
    """Writes and reads the checkpoints of one workdir: the best (see `rank`) and the two latest.

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
                if not path.name.isdecimal():
                    shutil.rmtree(path, ignore_errors=True)
        wait_for_all("folder of checkpoints")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._executor:
            self._wait()
        if kind is None:
            wait_for_all("last checkpoint written")

    def save(self, state: TrainState, config: Config, history: History, unfinished: Mapping[str, Any] | None) -> None:
        """Saves everything that a run needs to go on; returns before it is on disk.

        Args:
          state: after the last epoch of `history`, or within the next.
          config: of the run.
          history: all whole epochs so far; the one of least `rank`, which is finite, is the best.
          unfinished: JSON values to go on with within an epoch, or None between epochs.

        Raises:
          InputError: the checkpoint before could not be written.
        """
        self._wait()
        if not is_primary():
            return
        step = int(state.step)
        trees = {_VARIABLES: state.variables, _OPTIMIZER: _optimizer(state)}
        trees = jax.tree.map(np.array, jax.device_get(trees))  # a copy: the next step overwrites the state
        values = {_CONFIG: to_dict(config), _HISTORY: {"epochs": list(history), "unfinished": unfinished}}
        there = _steps(self._folder)
        keep = {step, *there[-1:], *_best([record for record in history if record["step"] in (*there, step)])}
        self._writing = self._executor.submit(self._write, step, trees, values, keep)

    def restore_latest(self, state: TrainState) -> Saved | None:
        """The latest good checkpoint, or None where nothing was saved.

        A damaged one is named, and moved to the workdir's folder damaged_checkpoints/.

        Args:
          state: one of the same shapes, for its structure.

        Raises:
          InputError: there are checkpoints, and none is good.
        """
        steps, damaged = _steps(self._folder), []
        for step in steps:
            try:
                _verify(self._folder / str(step))
            except _DamagedError as error:
                damaged.append(step)
                logger.warning("%s; it is left out", error)
        good = [step for step in steps if step not in damaged]
        if damaged and not good:
            raise InputError(f"{self._workdir}: none of its checkpoints is good; choose a new --workdir")
        self._set_aside(damaged)
        if not good:
            return None
        if damaged:
            logger.warning("going on from the checkpoint of step %d", good[-1])
        return _read(self._folder / str(good[-1]), state)

    def _write(self, step: int, trees: Mapping[str, Any], values: Mapping[str, Any], keep: set[int]) -> None:
        _write_folder(self._folder / str(step), trees, values)
        for old in _steps(self._folder):
            if old not in keep:  # renamed before it is deleted, or a kill would leave half of one
                (self._folder / str(old)).rename(self._folder / _DELETED)
                shutil.rmtree(self._folder / _DELETED)

    def _wait(self) -> None:
        """Until the last checkpoint is written; tells what hindered it."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except Exception as error:  # orbax and TensorStore have no common base for it
            raise InputError(
                f"{self._folder}: the checkpoint cannot be written ({first_line(error)}); the last good one is "
                "untouched. Free the disk or mend the permissions; the same command goes on"
            ) from error

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Out of the way of the checkpoints to come, of which some have the same names."""
        wait_for_all("checkpoints verified")
        for step in steps if is_primary() else ():
            target = self._workdir / _DAMAGED / str(step)
            shutil.rmtree(target, ignore_errors=True)
            make_output_dir(target.parent)
            (self._folder / str(step)).rename(target)
        wait_for_all("damaged checkpoints set aside")


def _best(history: History) -> list[int]:
    """The step of the best checkpoint, the earliest of the epochs of least `rank`; empty where there is no epoch."""
    return [int(min(history, key=rank)["step"])] if history else []


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _optimizer(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "state": state.opt_state}


def _read(folder: Path, state: TrainState) -> Saved:
    """A checkpoint that is as it was written."""
    if not (folder / _FILES).is_file():
        raise InputError(
            f"{folder}: was written by resunet_jax 0.1.0 and cannot be verified; it can be evaluated, but not gone on "
            "with: choose a new --workdir"
        )
    history = _read_values(folder, _HISTORY)
    variables = _restore(folder / _VARIABLES, state.variables)
    optimizer = _restore(folder / _OPTIMIZER, _optimizer(state))
    return Saved(TrainState(optimizer["step"], variables, optimizer["state"]), history["epochs"], history["unfinished"])


def _write_folder(
    folder: Path, trees: Mapping[str, Any], values: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> None:
    """Writes pytrees, JSON files and text files by name, whole or not at all, and files.json."""
    with whole_folder(folder) as partial:
        # Takes the place on disk for a moment: what hinders orbax half-way is told a hundred times over.
        with tempfile.TemporaryFile(dir=partial) as file:
            os.posix_fallocate(file.fileno(), 0, sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(trees)))
        for name, value in values.items():
            write_text(partial / name, json.dumps(value, indent=2) + "\n")
        for name, text in (texts or {}).items():
            write_text(partial / name, text)
        for name, tree in trees.items():
            with _checkpointer() as checkpointer:
                checkpointer.save((partial / name).absolute(), tree)
        write_text(partial / _FILES, json.dumps(_digests(partial), indent=2) + "\n")


def _verify(folder: Path) -> None:
    """Compares every file with files.json; what resunet_jax 0.1.0 wrote has none, and passes.

    Raises:
      _DamagedError: a file is missing, or not what was written.
    """
    if not (folder / _FILES).is_file():
        if (folder / _HISTORY).is_file():
            raise _DamagedError(folder, f"{_FILES}: missing")
        return
    digests = _read_values(folder, _FILES)
    found = _digests(folder)
    for name, digest in digests.items():
        if name not in found:
            raise _DamagedError(folder, f"{name}: missing")
        if found[name] != digest:
            raise _DamagedError(folder, f"{name}: not what was written")
    if not {_CONFIG, f"{_VARIABLES}/manifest.ocdbt"} <= set(digests):
        raise _DamagedError(folder, f"{_FILES}: not what was written")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by its path there."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _FILES:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_values(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object; resunet_jax 0.1.0 kept a checkpoint's in a folder of its name."""
    path = folder / name
    if not path.exists() and (folder / Path(name).stem / "metadata").is_file():
        path = folder / Path(name).stem / "metadata"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _DamagedError(folder, f"{name}: {first_line(error)}") from error
    return values


def _restore(folder: Path, tree: Any) -> Any:
    """A pytree of NumPy arrays of the shapes in `tree`, whatever devices it was on."""
    with _checkpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree))


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def load_model(path: str | Path) -> LoadedModel:
    """Restores a model from its folder alone.

    Args:
      path: a training workdir, of which the best checkpoint is taken, or a folder written by `save_model`.

    Returns:
      (model, variables, config).

    Raises:
      InputError: no checkpoint there, or it does not fit its config.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint folder; train first, or mend the path")
    try:
        if (path / CHECKPOINTS).is_dir():
            return _load_best(path)
        if (path / _VARIABLES).is_dir():
            return _load_folder(path)
    except InputError:
        raise
    except _DamagedError as error:
        raise InputError(f"{error}; use a copy of it, or train again") from error
    except Exception as error:  # orbax has no common base for what a damaged folder makes it raise
        raise InputError(
            f"{path}: the model cannot be restored ({first_line(error)}), "
            "so it is damaged; use a copy of it, or train again"
        ) from error
    raise InputError(f"{path}: neither a training workdir nor an exported model; it has no {CHECKPOINTS}/")


def load_model_for(path: str | Path, target: str, flag: str) -> LoadedModel:
    """`load_model`, refusing a model of the other task.

    Args:
      path: see `load_model`.
      target: "lung" or "infection".
      flag: that named the path, for the message.
    """
    loaded = load_model(path)
    found = TASKS[loaded.config.task].target
    if found != target:
        raise InputError(f"{path}: {flag} wants a {target} model, this one segments {found}; give the other folder")
    return loaded


def save_model(path: str | Path, variables: Variables, config: Config, files: Mapping[str, str] | None = None) -> None:
    """Exports a model to a new folder that `load_model` takes: config.json and variables/.

    Args:
      path: must not exist.
      variables: {"params": ..., "batch_stats": ...}.
      config: how the model is to be used.
      files: further text files to lay beside it, by name.

    Raises:
      InputError: the folder exists or cannot be written.
    """
    path = Path(path).absolute()
    if path.exists():
        raise InputError(f"{path}: exists already; choose a new folder")
    _write_folder(path, {_VARIABLES: variables}, {_CONFIG: to_dict(config)}, files)


def _load_best(workdir: Path) -> LoadedModel:
    steps = _steps(workdir / CHECKPOINTS)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint in it yet; train first")
    folder = workdir / CHECKPOINTS / str(steps[-1])
    _verify(folder)
    history = _read_values(folder, _HISTORY)["epochs"]
    there = _best([record for record in history if record["step"] in steps])
    if not there:
        raise InputError(f"{workdir}: its training was stopped within the first epoch; go on with it")
    if there != _best(history):
        logger.warning(
            "%s: its best checkpoint, of step %d, is missing; taking the best of the others, of step %d",
            workdir,
            *_best(history),
            *there,
        )
    return _load_folder(workdir / CHECKPOINTS / str(there[0]))


def _load_folder(folder: Path) -> LoadedModel:
    _verify(folder)
    if not (folder / _FILES).is_file():
        logger.warning("%s: no %s in it, so nobody can tell whether the model is as it was written", folder, _FILES)
    config = from_dict(_read_values(folder, _CONFIG), str(folder / _CONFIG))
    model = build_model(config)
    expected = variable_shapes(model)
    with _checkpointer() as checkpointer:
        saved = checkpointer.metadata((folder / _VARIABLES).absolute()).item_metadata.tree
    if jax.tree.map(lambda x: tuple(x.shape), saved) != jax.tree.map(lambda x: x.shape, expected):
        raise InputError(
            f"{folder}: its parameters are of another architecture than its config says "
            f"(filters {','.join(map(str, config.model.filters))}, {model.in_channels} input channels); "
            "use the config that it was saved with"
        )
    # To the device: arrays of the host would travel there at each call.
    return LoadedModel(model, jax.device_put(_restore(folder / _VARIABLES, expected)), config)


def save_threshold(workdir: Path, threshold: float, dice: float, cases: Sequence[str]) -> None:
    """Writes threshold.json beside a model: the threshold, and on which cases it reached which mean Dice."""
    values = {"threshold": threshold, "mean_dice": dice, "chosen_on": list(cases)}
    write_text(workdir / THRESHOLD_FILE, json.dumps(values, indent=2) + "\n")


def load_threshold(path: str | Path) -> float:
    """The threshold that a training chose on its validation cases, in (0, 1).

    Raises:
      InputError: there is none, or it makes no sense.
    """
    file = Path(path) / THRESHOLD_FILE
    try:
        threshold = json.loads(file.read_text(encoding="utf-8"))["threshold"]
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}")
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: no such file: the training had no validation case to choose a threshold on, or is not done; "
            "use --threshold=0.5"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: holds no threshold in (0, 1) ({first_line(error)}); use --threshold=0.5") from error
    return float(threshold)


def fingerprint(variables: Variables) -> str:
    """A digest that tells models apart: SHA-256 over names and values, 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(name).encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


def variable_shapes(model: ResUnet) -> Any:
    """Shapes and types of a model's variables, without making them."""
    dummy = jax.ShapeDtypeStruct((1, 8, 8, model.in_channels), np.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), dummy)
