"""Shared fixtures: the small phantom, a small trained cascade, and a way to run the scripts."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from resunet_jax.config import Config, ModelConfig, PreprocessConfig, TrainConfig
from resunet_jax.data.phantom import SMALL, make_phantom
from resunet_jax.data.splits import SplitRequest
from resunet_jax.training.run import train

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference"

TINY = {
    "preprocess": PreprocessConfig(image_size=32),
    "model": ModelConfig(filters=(4, 8, 16, 32)),
    "train": TrainConfig(epochs=2, learning_rate=3e-3, batch_size=4),
}
TINY_FLAGS = ("--image_size=32", "--filters=4,8,16,32", "--learning_rate=3e-3", "--batch_size=4")


def run_script(name: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Runs experiments/<name>.py as a user would, and waits."""
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{name}.py", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


class Trained(NamedTuple):
    data: Path
    cache: Path
    split_file: Path
    lung: Path
    infection: Path


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small phantom set; not to be changed."""
    folder = tmp_path_factory.mktemp("phantom") / "set"
    make_phantom(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def trained(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny lung model and a tiny infection model, two epochs each; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    split_file = root / "split.json"
    split_file.write_text(
        '{"train": ["coronacases_001", "radiopaedia_10_85902_1", "radiopaedia_10_85902_3"],'
        ' "val": ["coronacases_002"], "test": ["coronacases_003", "radiopaedia_14_85914_0"]}'
    )
    paths = Trained(phantom, root / "cache", split_file, root / "lung", root / "infection")
    for task, workdir, lung in (("lung", paths.lung, None), ("infection", paths.infection, paths.lung)):
        config = Config(task=task, **TINY)
        train(config, phantom, workdir, paths.cache, split=SplitRequest(split_file), lung_checkpoint=lung)
    return paths


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
