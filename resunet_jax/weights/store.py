"""Models on disk: folders that are restored from nothing but themselves.

A model's folder holds config.json, variables/ (by orbax) and files.json, the SHA-256 of every file in it; that of a
checkpoint holds optimizer/ and history.json too. It is written atomically, and compared with files.json before it is
used.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import flax.core
import jax
import numpy as np
import orbax.checkpoint as ocp

from resunet_jax.config import Config, Structure, from_dict, to_dict
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import atomic_dir, expand_user, require_absent, reserve, sha256, write_json, write_text
from resunet_jax.model.build import ARCHITECTURES, TASKS, Architecture, build_model, model_image_size
from resunet_jax.model.resunet import Variables, init_variables
from resunet_jax.progress import logger
from resunet_jax.weights.uncertainty import UNCERTAINTY_FILE

_T = TypeVar("_T")

_COMMIT_FILE = "commit_success.txt"  # of orbax, which names the folder of this machine; local disks need none
_ATTEMPTS = 5  # to read from a workdir whose training rotates its checkpoints

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds its checkpoints, each in a folder with the number of its step."""

THRESHOLD_FILE = "threshold.json"
"""File of a workdir with the threshold chosen on its validation cases."""

CONFIG_FILE = "config.json"
HISTORY_FILE = "history.json"
DIGESTS_FILE = "files.json"
VARIABLES = "variables"
TORCH_COUNTERS_FILE = "torch_counters.json"
_NOT_VERIFIED = (DIGESTS_FILE, UNCERTAINTY_FILE, TORCH_COUNTERS_FILE)  # a model may get them anew, or lose them

History = list[dict[str, Any]]
"""One record per epoch, as in metrics.jsonl."""


class LoadedModel(NamedTuple):
    """A restored model.

    Attributes:
      model: the module.
      variables: {"params": ..., "batch_stats": ...}.
      config: how it was made and how it is to be used.
    """

    model: Any
    variables: Variables
    config: Config


def selection_loss(record: dict[str, Any]) -> float:
    """What the best checkpoint has least of: the validation loss; without one, a later epoch is better."""
    return float(-record["epoch"] if record["val_loss"] is None else record["val_loss"])


class CorruptCheckpointError(Exception):
    """A folder is not as it was written; the message names it and says what of it."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"{folder}: damaged ({what})")


def best_step(history: History) -> list[int]:
    """The step of the best checkpoint: the first epoch of least `selection_loss`; empty where there is no epoch."""
    return [int(min(history, key=selection_loss)["step"])] if history else []


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def write_folder(
    folder: Path, trees: Mapping[str, Any], values: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> None:
    """Writes pytrees, JSON files and text files by name, and files.json; the folder appears atomically."""
    with atomic_dir(folder) as partial:
        # Reserves the space for a moment: orbax would report a full disk in hundreds of lines.
        with tempfile.TemporaryFile(dir=partial) as file:
            reserve(file, sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(trees)))
        for name, value in values.items():
            write_json(partial / name, value)
        for name, text in (texts or {}).items():
            write_text(partial / name, text)
        for name, tree in trees.items():
            # Arrays of the host: of others orbax notes the devices, which the next machine may lack.
            host = jax.tree.map(np.asarray, jax.device_get(tree))
            with _checkpointer() as checkpointer:
                checkpointer.save((partial / name).absolute(), args=ocp.args.StandardSave(host))
            (partial / name / _COMMIT_FILE).unlink(missing_ok=True)
        write_json(partial / DIGESTS_FILE, _digests(partial))


def verify_folder(folder: Path) -> None:
    """Compares every file with files.json; what resunet_jax 0.1.0 wrote has none, and passes.

    Raises:
      CorruptCheckpointError: a file is missing, or not what was written.
    """
    if not (folder / DIGESTS_FILE).is_file():
        if (folder / HISTORY_FILE).is_file():
            raise CorruptCheckpointError(folder, f"{DIGESTS_FILE}: missing")
        return
    digests = read_values(folder, DIGESTS_FILE)
    found = _digests(folder)
    for name, digest in digests.items():
        if name in _NOT_VERIFIED:  # before 0.20.0 they had a digest
            continue
        if name not in found:
            raise CorruptCheckpointError(folder, f"{name}: missing")
        if found[name] != digest:
            raise CorruptCheckpointError(folder, f"{name}: not what was written")
    if not {CONFIG_FILE, f"{VARIABLES}/manifest.ocdbt"} <= set(digests):
        raise CorruptCheckpointError(folder, f"{DIGESTS_FILE}: not what was written")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder that may not change, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _NOT_VERIFIED)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def read_values(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object; resunet_jax 0.1.0 kept a checkpoint's in a folder of its name."""
    path = folder / name
    if not path.exists() and (folder / Path(name).stem / "metadata").is_file():
        path = folder / Path(name).stem / "metadata"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(folder, f"{name}: {first_line(error)}") from error
    return values


def restore_tree(folder: Path, tree: Any) -> Any:
    """A pytree of NumPy arrays of the shapes in `tree`, whatever devices it was on."""
    with _checkpointer() as checkpointer:
        host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
        return checkpointer.restore(folder.absolute(), args=ocp.args.StandardRestore(host))


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def load_model(path: str | Path, architectures: Mapping[str, Architecture] = ARCHITECTURES) -> LoadedModel:
    """Restores a model from its folder alone.

    Args:
      path: a training workdir, of which the best checkpoint is taken, or a saved model.
      architectures: the table of models.

    Returns:
      (model, variables, config).

    Raises:
      InputError: no checkpoint there, or it does not fit its config.
    """
    path = expand_user(path)
    require_backend()
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint folder; train first, or check the path")
    folder = path

    def load() -> LoadedModel:
        nonlocal folder
        if (path / CHECKPOINTS).is_dir():
            folder = best_checkpoint(path)
        elif not (path / VARIABLES).is_dir():
            raise InputError(f"{path}: neither a training workdir nor a saved model; it has no {CHECKPOINTS}/")
        return _load_folder(folder, architectures)

    try:
        return _read_rotating(path, load)
    except InputError:
        raise
    except Exception as error:  # orbax has no common base for what a damaged folder makes it raise
        raise _cannot_load(folder, error) from error


def _read_rotating(workdir: Path, read: Callable[[], _T]) -> _T:
    """What `read` returns; again where its training has meanwhile deleted a checkpoint, for it has better ones."""
    folder = workdir / CHECKPOINTS

    def steps() -> list[int]:
        return checkpoint_steps(folder) if folder.is_dir() else []

    for _ in range(_ATTEMPTS - 1):
        before = steps()
        try:
            return read()
        except InputError:
            raise
        except Exception:
            if steps() == before:
                raise
    return read()


def _cannot_load(folder: Path, error: Exception) -> InputError:
    if isinstance(error, PermissionError) or not os.access(folder, os.R_OK | os.X_OK):
        return InputError(f"{folder}: no permission to read the model; change its permissions")
    if isinstance(error, CorruptCheckpointError):
        return InputError(f"{error}; use a copy of it, or train again")
    return InputError(
        f"{folder}: the model cannot be restored ({first_line(error)}), so it is damaged; use a copy of it, or train "
        "again"
    )


def require_backend() -> None:
    """Raises `InputError` where JAX cannot start, as on a machine without the device that JAX_PLATFORMS names."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # which of them depends on the device
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX cannot start ({first_line(error)}); JAX_PLATFORMS is {asked!r}: unset it, or install JAX for that "
            "device"
        ) from error


def load_model_for(
    path: str | Path, structure: Structure, architectures: Mapping[str, Architecture] = ARCHITECTURES
) -> LoadedModel:
    """`load_model`, refusing a model of the other structure."""
    loaded = load_model(path, architectures)
    found = TASKS[loaded.config.task].target
    if found != structure:
        raise InputError(f"{path}: expected a {structure} model, this one segments {found}; give the other folder")
    return loaded


def save_model(path: str | Path, variables: Variables, config: Config, files: Mapping[str, str] | None = None) -> None:
    """Exports a model to a new folder that `load_model` takes: config.json and variables/.

    Args:
      path: must not exist.
      variables: {"params": ..., "batch_stats": ...}.
      config: how the model is to be used.
      files: further text files for the folder, by name.

    Raises:
      InputError: the folder exists or cannot be written.
      ValueError: the variables are not those of the config's model, or not finite.
    """
    path = expand_user(path).absolute()
    require_absent(path)
    _check_variables(variables, config)
    write_folder(path, {VARIABLES: variables}, {CONFIG_FILE: to_dict(config)}, files)


def _check_variables(variables: Variables, config: Config) -> None:
    """Refuses what `load_model` would, before the only copy of it is gone; of a plugin's architecture NaN alone."""
    if config.model.architecture in ARCHITECTURES:
        expected = jax.tree.map(lambda leaf: leaf.shape, variable_shapes(build_model(config), model_image_size(config)))
        if jax.tree.map(np.shape, flax.core.unfreeze(variables)) != expected:
            raise ValueError("`variables` are not those of the config's model; give its params and batch_stats")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise ValueError("some of the `variables` are NaN or infinite")


def best_checkpoint(workdir: Path) -> Path:
    """The folder of a workdir's best checkpoint; a warning says where that is not the best of its history.

    Raises:
      InputError: there is none yet.
      CorruptCheckpointError: the latest one is damaged.
    """
    steps = checkpoint_steps(workdir / CHECKPOINTS)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint in it yet; train first")
    latest = workdir / CHECKPOINTS / str(steps[-1])
    verify_folder(latest)
    history = read_values(latest, HISTORY_FILE)["epochs"]
    available = best_step([record for record in history if record["step"] in steps])
    if not available:
        raise InputError(f"{workdir}: its training was stopped within the first epoch; resume it")
    if available != best_step(history):
        logger.warning(
            "%s: its best checkpoint, of step %d, is missing; taking the best of the others, of step %d",
            workdir,
            *best_step(history),
            *available,
        )
    return workdir / CHECKPOINTS / str(available[0])


def _load_folder(folder: Path, architectures: Mapping[str, Architecture]) -> LoadedModel:
    verify_folder(folder)
    if not (folder / DIGESTS_FILE).is_file():
        logger.warning("%s: no %s in it, so nobody can tell whether it is as it was written", folder, DIGESTS_FILE)
    config = from_dict(read_values(folder, CONFIG_FILE), str(folder / CONFIG_FILE))
    model = build_model(config, architectures=architectures)
    expected = variable_shapes(model, model_image_size(config))
    with _checkpointer() as checkpointer:
        saved = checkpointer.metadata((folder / VARIABLES).absolute()).item_metadata.tree
    if jax.tree.map(lambda x: tuple(x.shape), saved) != jax.tree.map(lambda x: x.shape, expected):
        raise InputError(
            f"{folder}: its parameters are of another architecture than its config says "
            f"(filters {','.join(map(str, config.model.filters))}, {model.in_channels} input channels); "
            "use the config that it was saved with"
        )
    variables = restore_tree(folder / VARIABLES, expected)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise InputError(f"{folder}: some of its parameters are NaN or infinite; train again, or use another model")
    # To the device: arrays of the host would travel there at each call.
    return LoadedModel(model, jax.device_put(variables), config)


def save_threshold(workdir: Path, threshold: float, dice: float, cases: Sequence[str]) -> None:
    """Writes threshold.json for the best checkpoint: the threshold, its mean Dice, on which cases, and the step."""
    values = {"threshold": threshold, "mean_dice": dice, "chosen_on": list(cases)}
    write_json(workdir / THRESHOLD_FILE, {**values, "step": int(best_checkpoint(workdir).name)})


def load_threshold(path: str | Path) -> float:
    """The threshold that a training chose on its validation cases, in (0, 1).

    Raises:
      InputError: there is none, it makes no sense, or it was chosen for another checkpoint than the best one.
    """
    folder = expand_user(path)
    file = folder / THRESHOLD_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        threshold, step = float(values["threshold"]), values.get("step")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}")
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: no such file: the training had no validation case to choose a threshold on, or is not done; "
            "leave `validated_threshold` out"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"{file}: holds no threshold in (0, 1) ({first_line(error)}); leave `validated_threshold` out"
        ) from error
    if step is not None and (folder / CHECKPOINTS).is_dir() and _best_name(folder) != str(step):
        raise InputError(
            f"{file}: was chosen for the checkpoint of step {step}, which is not the best any more; resume the "
            "training, which chooses it anew, or leave `validated_threshold` out"
        )
    return threshold


def _best_name(workdir: Path) -> str:
    try:
        return _read_rotating(workdir, lambda: best_checkpoint(workdir)).name
    except (CorruptCheckpointError, OSError) as error:
        raise _cannot_load(workdir, error) from error


def fingerprint(variables: Variables) -> str:
    """A digest that identifies a model: SHA-256 over names and values, 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(name).encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


def variable_shapes(model: Any, image_size: int = 64) -> Any:
    """Shapes and types of a model's variables, without making them; for arguments see `init_variables`."""
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_size))
