"""Shared fixtures: the small phantom, a small trained cascade, and a way to run the scripts."""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings

from resunet_jax.config import CascadeConfig, Config, ModelConfig, PostprocessConfig, PreprocessConfig, TrainConfig
from resunet_jax.data.phantom import SMALL, make_phantom
from resunet_jax.data.readers import open_scan
from resunet_jax.data.readers.nifti import nifti_writer
from resunet_jax.data.splits import SplitRequest
from resunet_jax.data.volume import Array, Grid
from resunet_jax.recipes import recipe
from resunet_jax.training.train import train
from resunet_jax.weights.store import LoadedModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one of them would leave the other worker idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# The seeded sample of every run, 300 inputs over all fuzz tests; `-m exhaustive` takes the other.
settings.register_profile("seeded", deadline=None, database=None, derandomize=True, max_examples=60)
settings.register_profile("exhaustive", deadline=None, database=None, max_examples=20_000)
settings.load_profile("seeded")

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference"

TINY = {
    "preprocess": PreprocessConfig(image_size=32, normalization="air"),
    "model": ModelConfig(filters=(4, 8, 16, 32)),
    "cascade": CascadeConfig(closing_fraction=0.125),
    "postprocess": PostprocessConfig(0.5, 0.0, "none", min_lesion_ml=0.0, min_lesion_probability=0.0),
    "augment": recipe("original", "lung").augment,
    # By steps, not by one cycle: such a run may grow.
    "train": TrainConfig(
        epochs=2,
        learning_rate=3e-3,
        ema_decay=0.1,
        batch_size=4,
        schedule="step",
        loss="bce",
        weight_decay=0.0,
        patience=10,
    ),
}
WITH_CONTEXT = dataclasses.replace(TINY["preprocess"], context_mm=5.0)
"""How the tiny infection model's slices are prepared."""

TINY_FLAGS = ("--image_size=32", "--filters=4,8,16,32", "--learning_rate=3e-3", "--batch_size=4")


def write_nifti(path: Path, array: Array, grid: Grid) -> None:
    """Writes an array (rows, columns, slices) whole."""
    with nifti_writer(path, array.dtype, grid) as write:
        write(0, array)


Done = subprocess.CompletedProcess[str]


def run_script(name: str, *flags: object, env: Mapping[str, str] | None = None) -> Done:
    """Runs experiments/<name>.py as a user would, with `env` added to the environment, and waits."""
    return run_file(ROOT / "experiments" / f"{name}.py", *flags, env=env)


def run_file(file: Path, *arguments: object, env: Mapping[str, str] | None = None) -> Done:
    """The same for any file of Python code."""
    env = {**os.environ, **(env or {})}
    is_usual = {name for name, _ in env.items() ^ _ENVIRONMENT.items()} <= _READ_WHEN_NEEDED
    folders = [Path(folder) for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if hasattr(os, "fork") and is_usual and not any((folder / "sitecustomize.py").exists() for folder in folders):
        return run_forked(file, *arguments, env=env)
    return subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        capture_output=True,
        encoding=env.get("PYTHONIOENCODING", "utf-8"),
        timeout=540,
        check=False,
        env=env,
    )


_ENVIRONMENT = dict(os.environ)
# By scripts, or the process that is forked; Python and jax read other variables as they start.
_READ_WHEN_NEEDED = {"HOME", "USERPROFILE", "XLA_FLAGS", "PYTEST_CURRENT_TEST", "PYTHONPATH", "PYTHONIOENCODING"}
_SCRIPTS_IMPORT = "resunet_jax.studies.runner,resunet_jax.inference.batch,resunet_jax.report.outputs"


def run_forked(file: Path, *arguments: object, env: Mapping[str, str], imports: str = _SCRIPTS_IMPORT) -> Done:
    """As `run_file`, in a fork of a process that lives as long as this one; `imports` as in tests/forked_scripts.py."""
    command = [str(file), *map(str, arguments)]
    server = _fork_server(imports)
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps([str(Path.cwd()), dict(env), *command]) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess(command, *json.loads(server.stdout.readline()))


@functools.cache
def _fork_server(imports: str) -> "subprocess.Popen[str]":
    command = [sys.executable, ROOT / "tests" / "forked_scripts.py", imports]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    atexit.register(server.communicate)  # the end of its input ends it
    return server


class Trained(NamedTuple):
    data: Path
    cache: Path
    split_file: Path
    lung: Path
    infection: Path


def with_averaging(loaded: LoadedModel) -> LoadedModel:
    """The model, asked to see a slice and its mirror image, and with context one of them without."""
    model = dataclasses.replace(loaded.config.model, mirroring=True, context_averaging=True)
    return loaded._replace(config=dataclasses.replace(loaded.config, model=model))


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def once(folder: Path) -> Iterator[bool]:
    """Whether this worker is the first; the others wait until it has made the folder."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield not folder.exists()


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small phantom set; not to be changed."""
    folder = shared_folder(tmp_path_factory) / "phantom"
    with once(folder) as first:
        if first:
            make_phantom(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def trained(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny lung model and a tiny infection model, two epochs each; not to be changed."""
    root = shared_folder(tmp_path_factory) / "trained"
    paths = Trained(phantom, root / "cache", root / "split.json", root / "lung", root / "infection")
    with once(root) as first:
        if first:
            root.mkdir()
            paths.split_file.write_text(
                '{"train": ["coronacases_001", "radiopaedia_10_85902_1", "radiopaedia_10_85902_3"],'
                ' "val": ["coronacases_002"], "test": ["coronacases_003", "radiopaedia_14_85914_0"]}'
            )
            for task, workdir, lung in (("lung", paths.lung, None), ("infection", paths.infection, paths.lung)):
                config, split = Config(task=task, **TINY), SplitRequest(paths.split_file)
                if lung:
                    config = dataclasses.replace(config, preprocess=WITH_CONTEXT)
                train(config, phantom, workdir, paths.cache, split=split, lung_checkpoint=lung)
    return paths


def training_flags(task: str, trained: Trained, workdir: Path, cache: Path, epochs: int) -> list[str]:
    """Flags of a tiny training by train_lung.py or train_infection.py."""
    lung = [f"--lung_checkpoint={trained.lung}"] if task == "infection" else []
    return [
        f"--data_dir={trained.data}",
        f"--workdir={workdir}",
        f"--cache_dir={cache}",
        f"--split_file={trained.split_file}",
        f"--epochs={epochs}",
        f"--patience={epochs}",
        *TINY_FLAGS,
        *lung,
    ]


def store_in_window(scans: Path, low: float, high: float) -> None:
    """Writes the scans of a folder anew, as exports to 0..255 over HU [low, high]."""
    for path in scans.iterdir():
        with open_scan(path) as scan:
            grid = scan.grid
            hu = grid.from_pls(scan.read_slices(0, grid.oriented_shape[-1]).to_hu())
        values = (np.clip(hu, low, high) - low) / (high - low) * 255
        nib.save(nib.Nifti1Image(np.rint(values).astype(np.uint8), grid.affine), path)


class KilledError(Exception):
    """Ends a run as a kill would, where `kill_at` was told to."""


def kill_at(monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: int) -> list[Path]:
    """Lets a module's `train` raise a `KilledError` once, at the call of that number; returns the folders trained."""
    real, calls, trained = module.train, itertools.count(1), []

    def train(config: Config, data: Path, workdir: Path, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KilledError
        trained.append(workdir)
        return real(config, data, workdir, *args, **kwargs)

    monkeypatch.setattr(module, "train", train)
    return trained


@pytest.fixture
def optimized() -> Iterator[None]:
    """For the shipped models, which are not tiny: running them would take longer than compiling them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
