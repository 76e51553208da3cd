"""Checkpoints of a training run, and models restored from nothing but their folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resunet_jax.config import Config, from_dict, to_dict
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import whole_folder, write_text
from resunet_jax.model.resunet import ResUnet, Variables
from resunet_jax.training.steps import TrainState
from resunet_jax.training.tasks import TASKS, build_model

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds its checkpoints."""

THRESHOLD_FILE = "threshold.json"
"""File of a workdir with the threshold chosen on its validation cases."""

_CONFIG = "config.json"
_VARIABLES = "variables"

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


def _saved_rank(metrics: dict[str, Any]) -> float:
    return float(metrics["rank"])


class Checkpoints:
    """The checkpoints of one workdir: the latest, and the best (see `rank`). Use as a context manager."""

    def __init__(self, workdir: Path, *, read_only: bool = False) -> None:
        """Opens them; makes the folder unless `read_only`."""
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_saved_rank,
                best_mode="min",
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(1), BestN(get_metric_fn=_saved_rank, reverse=True, n=1)]
                ),
                read_only=read_only,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState, batches: Any, config: Config, history: History) -> None:
        """Saves everything that a run needs to go on; returns before it is on disk, and is atomic.

        Args:
          state: after the last epoch of `history`.
          batches: the iterator of the training batches.
          config: of the run.
          history: all epochs so far; the last one's `rank`, which is finite, decides whether it is the best.
        """
        args = ocp.args.Composite(
            variables=ocp.args.StandardSave(state.variables),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
            data=grain.checkpoint.CheckpointSave(batches),
            config=ocp.args.JsonSave(to_dict(config)),
            history=ocp.args.JsonSave({"epochs": history}),
        )
        metrics = {"rank": rank(history[-1])}
        self._manager.save(int(state.step), args=args, metrics=metrics)

    def restore_latest(self, state: TrainState, batches: Any) -> tuple[TrainState, History] | None:
        """The latest state, with `batches` put to where it was, or None where nothing was saved.

        Args:
          state: one of the same shapes, for its structure.
          batches: a fresh iterator over the same slices; it is changed.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            variables=ocp.args.StandardRestore(_abstract(state.variables)),
            optimizer=ocp.args.StandardRestore(_abstract({"step": state.step, "state": state.opt_state})),
            data=grain.checkpoint.CheckpointRestore(batches),
            history=ocp.args.JsonRestore(),
        )
        items = self._manager.restore(step, args=args)
        optimizer = items.optimizer
        return TrainState(optimizer["step"], items.variables, optimizer["state"]), items.history["epochs"]

    def load_best(self, workdir: Path) -> LoadedModel:
        """The best model so far, by its own config."""
        step = self._manager.best_step()
        if step is None:
            raise InputError(f"{workdir}: no checkpoint in it yet; train first")
        config_args = ocp.args.Composite(config=ocp.args.JsonRestore())
        config = from_dict(self._manager.restore(step, args=config_args).config, str(workdir))
        folder = Path(self._manager.directory) / str(step) / _VARIABLES
        return _load_variables(folder, config)


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
            with Checkpoints(path, read_only=True) as checkpoints:
                return checkpoints.load_best(path)
        if (path / _VARIABLES).is_dir():
            return _load_exported(path)
    except InputError:
        raise
    except Exception as error:  # orbax has no common base for what a damaged folder makes it raise
        raise InputError(
            f"{path}: the checkpoint cannot be restored ({first_line(error)}), "
            "so it is damaged; use another, or train again"
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
    with whole_folder(path) as partial:
        for name, text in {_CONFIG: json.dumps(to_dict(config), indent=2) + "\n", **(files or {})}.items():
            write_text(partial / name, text)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / _VARIABLES, variables)


def _load_exported(path: Path) -> LoadedModel:
    config_file = path / _CONFIG
    try:
        config = from_dict(json.loads(config_file.read_text(encoding="utf-8")), str(config_file))
    except (OSError, ValueError) as error:
        raise InputError(f"{config_file}: cannot be read ({first_line(error)}); export the model again") from error
    return _load_variables((path / _VARIABLES).absolute(), config)


def _load_variables(folder: Path, config: Config) -> LoadedModel:
    model = build_model(config)
    expected = variable_shapes(model)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        if jax.tree.map(lambda x: tuple(x.shape), saved) != jax.tree.map(lambda x: x.shape, expected):
            raise InputError(
                f"{folder}: its parameters are of another architecture than its config says "
                f"(filters {','.join(map(str, config.model.filters))}, {model.in_channels} input channels); "
                "use the config that it was saved with"
            )
        return LoadedModel(model, checkpointer.restore(folder, _abstract(expected)), config)


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


def _abstract(tree: Any) -> Any:
    """Shapes, types and the place to restore to; without the place, a checkpoint from a GPU needs a GPU."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
