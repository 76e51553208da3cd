"""What the scripts share: flags, logging, and one clear line for input that is wrong; light to import, for --help."""

import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from resunet_jax.config import Config, LossName, Normalization, TaskName, override
from resunet_jax.data.splits import FOLDS, Protocol, SplitRequest
from resunet_jax.errors import InputError, StoppedError, first_line
from resunet_jax.files import default_cache_dir
from resunet_jax.recipes import DEFAULT_RECIPE, RecipeName, recipe

STOPPED = 75
"""Exit code of a training that was asked to stop and saved its state (EX_TEMPFAIL: the same command goes on)."""

_HEARTBEAT_SECONDS = 30  # without one from a process, the others end


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; an `InputError` becomes one line and exit code 2, a `StoppedError` 75."""
    _log_to_stderr()

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.getLogger().setLevel(logging.WARNING)
            logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every file, and what it raises
            logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what matters comes as an `InputError`
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]}; flags look like --name=value")
        try:
            _keep_compiled_programs()
            main()
        except InputError as error:
            _fail(str(error))
        except StoppedError as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(STOPPED)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not _is_one_of_several():
                raise
            _end_one_of_several(error)

    app.run(guarded)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    _leave(2)


def _end_one_of_several(error: Exception) -> None:
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        _fail(
            f"another process of this training has ended, or cannot be reached ({first_line(error)}); "
            "start all of them again, they go on from the last checkpoint"
        )
    traceback.print_exception(error)
    _leave(1)


def _leave(code: int) -> None:
    """Ends the process; at an orderly end, one of several would wait for the others, who wait for it."""
    if _is_one_of_several():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _log_to_stderr() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logger = logging.getLogger("resunet_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _keep_compiled_programs() -> None:
    """So that the next run of a script that compiles need not."""
    if "compilation_cache_dir" in flags.FLAGS and flags.FLAGS.compilation_cache_dir:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(Path(flags.FLAGS.compilation_cache_dir).expanduser()))


def path_flag(name: str, description: str) -> flags.FlagHolder:
    """A flag that holds a path, or None."""
    return flags.DEFINE_string(name, None, description)


def to_path(flag: flags.FlagHolder) -> Path | None:
    """The path that a flag holds."""
    return Path(flag.value).expanduser() if flag.value else None


def define_cache_flag() -> None:
    """--cache_dir, for every script that prepares slices."""
    flags.DEFINE_string("cache_dir", str(default_cache_dir()), "Folder of prepared slices; may be deleted at any time.")


def cache_dir() -> Path:
    """What --cache_dir says."""
    return Path(flags.FLAGS.cache_dir).expanduser()


def define_compilation_cache_flag() -> None:
    """--compilation_cache_dir, for every script that compiles."""
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_cache_dir() / "compiled")
    flags.DEFINE_string(
        "compilation_cache_dir", default, "Folder of compiled programs; may be deleted at any time. Empty for none."
    )


def define_recipe_flags() -> None:
    """Flags of the scripts that train by one recipe."""
    flags.DEFINE_enum(
        "recipe", DEFAULT_RECIPE, typing.get_args(RecipeName), "What the flags below are where they are not given."
    )
    flags.DEFINE_integer("seed", None, "Of initial parameters, order of slices and augmentation.", lower_bound=0)
    define_training_flags()


def define_training_flags() -> None:
    """Flags of every script that trains: what of a recipe is to be otherwise."""
    flags.DEFINE_string("data_dir", None, "Folder of the data set, in Kaggle's or Zenodo's layout.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of this run; the same command goes on with it.", required=True)
    flags.DEFINE_integer("image_size", None, "Side of the slices that the model sees, in pixels.")
    flags.DEFINE_enum("normalization", None, typing.get_args(Normalization), "Intensity scale of a slice.")
    flags.DEFINE_list("filters", None, "Channels of the four levels, as in 64,128,256,512.")
    flags.DEFINE_integer("batch_size", None, "Slices a step.")
    flags.DEFINE_integer("epochs", None, "Passes over the training slices, at most.")
    flags.DEFINE_float("learning_rate", None, "Adam's step size, at its highest.")
    flags.DEFINE_enum("loss", None, typing.get_args(LossName), "Loss.")
    flags.DEFINE_integer("patience", None, "Epochs without a lower validation loss before it stops.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the computation; parameters stay float32.")
    flags.DEFINE_bool("remat", None, "Less memory: computes what lies within residual blocks twice.")
    flags.DEFINE_integer("accumulate_steps", None, "Steps of which the mean gradient is one update.")
    flags.DEFINE_bool("skip_nonfinite", None, "Leaves out steps whose loss or gradient is not finite.")
    flags.DEFINE_integer("patch_factor", None, "2 cuts slices into 2×2 patches seen apart, and so on.")
    flags.DEFINE_multi_string(
        "set", [], "Any other field of config.json, as in --set=augment.max_zoom=0.3; may be given again and again."
    )
    flags.DEFINE_bool("allow_missing", False, "Forms a protocol of the full set from the cases that are there.")
    define_cache_flag()
    define_compilation_cache_flag()


def define_device_flags() -> None:
    """Flags of the training scripts that share the work out."""
    flags.DEFINE_string("devices", None, "Devices that share a batch: a number, or all; by default 1.")
    flags.DEFINE_bool("distributed", False, "One of several processes, which a cluster (SLURM, Open MPI, TPU) started.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where no cluster tells it.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def connect() -> tuple[int | None, Callable[[int], bool]]:
    """Joins the other processes, if there are any, and listens for SIGTERM and SIGINT.

    Returns:
      `devices` and `should_stop` for `train`.
    """
    values = flags.FLAGS
    devices = values.devices or "1"
    given = (values.coordinator_address, values.num_processes, values.process_id)
    if values.distributed or given != (None, None, None):
        _join(*given)
        devices = values.devices or "all"
    try:
        count = None if devices == "all" else int(devices)
    except ValueError as error:
        raise InputError(f"--devices={devices}: wanted a number, or all") from error
    return count, stop_signals()


def _join(*given: str | int | None) -> None:
    import jax

    if not flags.FLAGS.distributed and None in given:
        raise InputError("--coordinator_address, --num_processes and --process_id belong together; give all three")
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes do not come together ({first_line(error)}); check --coordinator_address and that all are up"
        ) from error
    faulthandler.disable()  # JAX ends a process whose fellow died with a message, which stacks would bury
    if jax.process_index() > 0:
        logging.getLogger("resunet_jax").setLevel(logging.ERROR)


def stop_signals() -> Callable[[int], bool]:
    """A function that says whether to stop, at the next step after a signal; a second one ends a lone process."""
    if _is_one_of_several():
        from jax.experimental import multihost_utils

        # All must stop at the same step: JAX hears SIGTERM, and tells the others.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return multihost_utils.reached_preemption_sync_point
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: stopping at the next step; once more stops at once", file=sys.stderr)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, receive)
    return lambda step: bool(received)


def define_split_flags() -> None:
    """Flags of both training scripts that choose the cases."""
    path_flag("split_file", 'JSON {"train": [ids], "val": [ids], "test": [ids]}.')
    flags.DEFINE_integer("split_seed", None, "Of --protocol=ratio.", lower_bound=0)
    flags.DEFINE_enum(
        "protocol",
        None,
        typing.get_args(Protocol),
        "How cases are shared out; by default original where the full set is there, otherwise ratio.",
    )
    flags.DEFINE_integer("fold", None, f"Of a protocol with folds, 0 to {FOLDS - 1}.", lower_bound=0)


def split_request() -> SplitRequest:
    """The split that the flags ask for."""
    values = flags.FLAGS
    return SplitRequest(
        split_file=to_path(values["split_file"]),
        protocol=values.protocol,
        fold=values.fold,
        seed=values.split_seed,
        allow_missing=values.allow_missing,
    )


def define_mask_flags() -> None:
    """Flags of every script that makes masks by a trained model."""
    flags.DEFINE_enum(
        "threshold", "0.5", ["0.5", "validated"], "Of the masks: 0.5, or what each training chose on validation cases."
    )
    flags.DEFINE_float(
        "smallest_region",
        None,
        "Regions of a lung mask under this part of the largest are dropped, 0 for none; by default as it was trained.",
    )


_FIELDS = {
    "image_size": "preprocess",
    "normalization": "preprocess",
    "filters": "model",
    "dtype": "model",
    **dict.fromkeys(
        ("batch_size", "epochs", "learning_rate", "loss", "patience", "accumulate_steps", "skip_nonfinite", "remat"),
        "train",
    ),
    "patch_factor": "train",
    "seed": "train",
}
"""Flags that are fields of a config, and of which part."""


def config_from_flags(task: TaskName) -> Config:
    """The config that the training flags describe."""
    return override(recipe(flags.FLAGS.recipe, task), changes_from_flags(), "flags")


def changes_from_flags() -> dict[str, Any]:
    """What the flags change of a recipe, for `override`."""
    values = flags.FLAGS
    given = {name: values[name].value for name in _FIELDS if name in values}
    changes = {f"{_FIELDS[name]}.{name}": value for name, value in given.items() if value is not None}
    if values.filters is not None:
        try:
            changes["model.filters"] = [int(f) for f in values.filters]
        except ValueError as error:
            raise InputError(
                f"--filters={','.join(values.filters)}: wanted four numbers, as in 64,128,256,512"
            ) from error
    for item in values.set:
        path, equals, text = item.partition("=")
        if not equals or "." not in path:
            raise InputError(f"--set={item}: wanted a field and its value, as in --set=augment.max_zoom=0.3")
        try:
            changes[path] = json.loads(text)
        except ValueError:
            changes[path] = text
    return changes
