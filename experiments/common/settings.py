"""Flags, most of them made from the fields of a config, and what they ask for."""

import contextlib
import json
import math
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from common import processes
from common.run import stop_signals
from resunet_jax.config import INFECTION_POSTPROCESS, SETTINGS, Structure, TaskName, override
from resunet_jax.data.slice_cache import MAX_CACHE_GB
from resunet_jax.data.splits import NUM_FOLDS, Protocol, SplitRequest
from resunet_jax.errors import InputError
from resunet_jax.files import default_cache_dir, expand_user
from resunet_jax.recipes import DEFAULT_RECIPE, RecipeName, recipe

if TYPE_CHECKING:
    from resunet_jax.inference.predictor import Predictor
    from resunet_jax.studies.runner import Study
    from resunet_jax.weights.store import LoadedModel

flags.disclaim_key_flags()  # flags are of the script that asks for them, so that its --help shows them

_FLAGGED = (
    "preprocess.image_size",
    "preprocess.normalization",
    "model.architecture",
    "model.filters",
    "model.dtype",
    "model.patch_grid",
    "train.batch_size",
    "train.epochs",
    "train.learning_rate",
    "train.loss",
    "train.patience",
    "train.remat",
    "train.accumulate_steps",
    "train.skip_nonfinite",
    "train.seed",
)
"""Fields of a config with a flag of their own; the others are set by --set."""

_ALIASES = {"patch_grid": "patch_factor", "min_component_fraction": "smallest_region"}
"""Flags and what they were called in 0.6.0, which still works."""


_DEFINE: dict[Any, Callable[..., Any]] = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def define_path(name: str, description: str, *, required: bool = False, default: str | None = None) -> None:
    """A flag that holds a path; ~ is the home folder."""
    flags.DEFINE_string(name, default, description, required=required)


def path(name: str) -> Path:
    """The path of a flag that is required or has a default."""
    if not getattr(flags.FLAGS, name):  # as of a shell variable that is not set
        raise InputError(f"--{name} is empty; give a path, or leave the flag out")
    return expand_user(getattr(flags.FLAGS, name))


def optional_path(name: str) -> Path | None:
    """The path of a flag, or None."""
    return None if getattr(flags.FLAGS, name) is None else path(name)


def _define_field(field: str, note: str = "") -> None:
    setting, name = SETTINGS[field], field.partition(".")[2]
    text = setting.help + note
    if setting.choices:
        flags.DEFINE_enum(name, None, setting.choices, text)
    elif typing.get_origin(setting.kind) is tuple:
        flags.DEFINE_list(name, None, text)
    else:
        define = _DEFINE.get(setting.kind, flags.DEFINE_string)
        define(name, None, text)
    if name in _ALIASES:
        flags.DEFINE_alias(_ALIASES[name], name)


def define_data_flags() -> None:
    """--data_dir and --assume."""
    define_path("data_dir", "Folder of the data set, in Kaggle's or Zenodo's layout.", required=True)
    define_assume_flag()


def define_assume_flag() -> None:
    """--assume, of every script that reads scans."""
    flags.DEFINE_string(
        "assume", None, "What the scans' values are: hu, or window:LOW,HIGH in HU for 0..255; by default inferred."
    )


def assumption() -> tuple[float, float] | None:
    """What --assume says, for `open_scan`."""
    from resunet_jax.data.intensity import parse_assumption

    return parse_assumption(flags.FLAGS.assume) if flags.FLAGS.assume else None


def define_cache_flags() -> None:
    """--cache_dir, --max_cache_gb and --compilation_cache_dir."""
    define_path(
        "cache_dir", "Folder of preprocessed slices; may be deleted at any time.", default=str(default_cache_dir())
    )
    text = "Size limit of --cache_dir in GB: the least recently used slices that are not in use are removed."
    flags.DEFINE_float("max_cache_gb", MAX_CACHE_GB, text, lower_bound=0)
    flags.register_validator("max_cache_gb", math.isfinite, "it must be a finite number")
    define_compilation_cache_flag()


def define_compilation_cache_flag() -> None:
    """--compilation_cache_dir, for every script that compiles."""
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_cache_dir() / "compiled")
    define_path(
        "compilation_cache_dir",
        "Folder of compiled programs; may be deleted at any time. Empty for none.",
        default=default,
    )


def define_recipe_flags() -> None:
    """Flags of the scripts that train by one recipe."""
    flags.DEFINE_enum(
        "recipe", DEFAULT_RECIPE, typing.get_args(RecipeName), "Gives every training setting that no flag sets."
    )
    _define_field("train.seed")
    define_training_flags()


def define_training_flags() -> None:
    """Flags of every script that trains: what of a recipe is to be different."""
    define_data_flags()
    define_path("workdir", "Folder of this run; the same command resumes it.", required=True)
    flags.DEFINE_bool(
        "tensorboard",
        False,
        "Also writes metrics and figures for TensorBoard, in tensorboard/ of each model's folder.",
    )
    for field in _FLAGGED:
        if field != "train.seed":
            _define_field(field)
    flags.DEFINE_multi_string("set", [], "As in --set=augment.max_scale=0.3: any other field of config.json.")
    flags.DEFINE_bool("allow_missing", False, "Forms a protocol of the full set from the cases that are there.")
    define_cache_flags()


def define_split_flags() -> None:
    """Flags of both training scripts that choose the cases."""
    define_path("split_file", 'JSON {"train": [ids], "val": [ids], "test": [ids]}.')
    flags.DEFINE_integer("split_seed", None, "Seed of --protocol=ratio, by default 0.", lower_bound=0)
    flags.DEFINE_enum(
        "protocol",
        None,
        typing.get_args(Protocol),
        "How cases are split; by default original where the full set is there, otherwise ratio.",
    )
    flags.DEFINE_integer("fold", None, f"Of a protocol with folds, 0 to {NUM_FOLDS - 1}.", lower_bound=0)


def define_initial_checkpoint_flag() -> None:
    """--initial_checkpoint, of both training scripts."""
    define_path(
        "initial_checkpoint",
        "Fine-tuning: a trained model of the same structure to begin with, a training workdir or a saved model.",
    )


def define_initial_pair_flags() -> None:
    """--initial_lung_checkpoint and --initial_infection_checkpoint, of the scripts that train pairs."""
    for structure in typing.get_args(Structure):
        text = f"Fine-tuning: a trained {structure} model that every training of one begins with."
        define_path(f"initial_{structure}_checkpoint", text)


def initial_pair() -> dict[Structure, Path]:
    """What these flags give, by structure."""
    structures: tuple[Structure, ...] = typing.get_args(Structure)
    paths = {structure: optional_path(f"initial_{structure}_checkpoint") for structure in structures}
    return {structure: path for structure, path in paths.items() if path is not None}


def split_request() -> SplitRequest:
    """The split that the flags ask for."""
    values = flags.FLAGS
    return SplitRequest(
        split_file=optional_path("split_file"),
        protocol=values.protocol,
        fold=values.fold,
        split_seed=values.split_seed,
        allow_missing=values.allow_missing,
    )


def define_checkpoint_flags() -> None:
    """Flags of every script that uses trained models."""
    define_path(
        "lung_checkpoint",
        "Lung model: a training workdir (its best checkpoint) or a saved model; with neither model, the shipped pair.",
    )
    define_path("infection_checkpoint", "Infection model, the same.")
    flags.DEFINE_enum(
        "threshold",
        None,
        ["0.5", "validated"],
        "Of the masks: 0.5, or what each training chose on validation cases; by default as each model's recipe says.",
    )
    text = (
        "Infection is where its probability is above this, whatever --threshold is; lower finds more, true and false."
    )
    flags.DEFINE_float("infection_threshold", None, text)
    flags.register_validator(
        "infection_threshold", lambda value: value is None or 0 < value < 1, "it must lie between 0 and 1"
    )


def checkpoint_arguments() -> dict[str, Any]:
    """What the checkpoint flags ask for, as keywords of `load_predictor` and `evaluate`."""
    lung, infection = optional_path("lung_checkpoint"), optional_path("infection_checkpoint")
    thresholds = {"lung": 0.5, "infection": 0.5} if flags.FLAGS.threshold == "0.5" else {}
    if flags.FLAGS.infection_threshold is not None:
        if lung and not infection:
            raise InputError(
                "--infection_threshold: there is no infection; give --infection_checkpoint, or leave it out"
            )
        thresholds["infection"] = flags.FLAGS.infection_threshold
    return {
        "lung_checkpoint": lung,
        "infection_checkpoint": infection,
        "thresholds": thresholds or None,
        "validated_threshold": flags.FLAGS.threshold == "validated",
    }


def load_cascade() -> "tuple[Predictor, LoadedModel, LoadedModel]":
    """What the checkpoint flags ask for, and its lung and infection model.

    Raises:
      InputError: there is only one.
    """
    from resunet_jax.inference.predictor import load_predictor
    from resunet_jax.plugins import load_plugins

    predictor = load_predictor(**checkpoint_arguments(), architectures=load_plugins().architectures)
    if predictor.lung is None or predictor.infection is None:
        raise InputError("a cascade is exported: give --lung_checkpoint and --infection_checkpoint, or neither")
    return predictor, predictor.lung, predictor.infection


def train_from_flags(task: TaskName, lung_checkpoint: Path | None = None) -> None:
    """Trains a model as the training flags describe; SIGTERM and SIGINT stop it."""
    config = override(recipe(flags.FLAGS.recipe, task), changes_from_flags(), "flags")

    from resunet_jax.plugins import load_plugins
    from resunet_jax.training.tensorboard import tensorboard_writer
    from resunet_jax.training.train import train

    devices, workdir = processes.init_distributed(), path("workdir")
    with tensorboard_writer(workdir, wanted=flags.FLAGS.tensorboard) as on_epoch:
        train(
            config,
            path("data_dir"),
            workdir,
            path("cache_dir"),
            split=split_request(),
            lung_checkpoint=lung_checkpoint,
            initial_checkpoint=optional_path("initial_checkpoint"),
            devices=devices,
            should_stop=stop_signals(),
            on_epoch=on_epoch,
            assumed=assumption(),
            max_cache_gb=flags.FLAGS.max_cache_gb,
            **load_plugins().for_training,
        )


def study() -> "Study":
    """What the data and folder flags ask for; SIGTERM and SIGINT stop it."""
    from resunet_jax.plugins import load_plugins
    from resunet_jax.studies.runner import Study

    return Study(
        path("data_dir"),
        path("workdir"),
        path("cache_dir"),
        stop_signals(),
        load_plugins(),
        assumed=assumption(),
        max_cache_gb=flags.FLAGS.max_cache_gb,
        tensorboard=flags.FLAGS.tensorboard,
        initial=initial_pair(),
    )


def define_model_flags() -> None:
    """Flags of every script that makes masks by trained models."""
    define_checkpoint_flags()
    flags.DEFINE_integer("batch_size", 8, "Slices at a time; it does not change the result.", lower_bound=1)
    _define_field("postprocess.min_component_fraction", "; by default as the lung model was trained.")
    for name in INFECTION_POSTPROCESS:
        _define_field(f"postprocess.{name}", "; by default as the infection model was trained.")


def model_arguments() -> dict[str, Any]:
    """What the model flags ask for, as keywords of `load_predictor` and `evaluate`."""
    return {
        **checkpoint_arguments(),
        "batch_size": flags.FLAGS.batch_size,
        "min_component_fraction": flags.FLAGS.min_component_fraction,
        "infection_postprocess": {
            n: flags.FLAGS[n].value for n in INFECTION_POSTPROCESS if flags.FLAGS[n].value is not None
        },
    }


def changes_from_flags() -> dict[str, Any]:
    """What the flags change of a recipe, for `override`."""
    values = flags.FLAGS
    given = {field: values[field.partition(".")[2]].value for field in _FLAGGED if field.partition(".")[2] in values}
    changes = {field: value for field, value in given.items() if value is not None}
    if "model.filters" in changes:
        try:
            changes["model.filters"] = [int(f) for f in values.filters]
        except ValueError as error:
            raise InputError(
                f"--filters={','.join(values.filters)}: it must be four numbers, as in 64,128,256,512"
            ) from error
    for item in values.set:
        field, equals, text = item.partition("=")
        if not equals or "." not in field:
            raise InputError(f"--set={item}: it must be a field and its value, as in --set=augment.max_scale=0.3")
        value: Any = text
        with contextlib.suppress(ValueError):
            value = json.loads(text)
        if changes.get(field, value) != value:
            raise InputError(f"--set={item}: another flag says that {field} is {changes[field]}; drop one of them")
        changes[field] = value
    return changes
