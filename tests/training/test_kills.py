"""Trainings that are killed at any moment and started again, as a user starts them."""

import json
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from resunet_jax.config import Config, from_dict, non_defaults
from resunet_jax.training.checkpoints import Checkpoints
from resunet_jax.training.step import create_state, make_optimizer
from resunet_jax.weights.store import load_model
from tests.conftest import ROOT, TINY, Trained, run_file, run_script, training_flags
from tests.fault_injection import MOMENTS


def outcome(workdir: Path) -> tuple[list[np.ndarray], list[dict]]:
    """Every array of the latest state and of the best model, and the records but for their times."""
    best = load_model(workdir)
    config = from_dict(json.loads((workdir / "config.json").read_text()))
    with Checkpoints(workdir) as checkpoints:
        saved = checkpoints.restore_latest(create_state(config, make_optimizer(config, 8)))
    assert saved.partial_epoch is None
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in record.items() if "second" not in name} for record in records]
    return [np.asarray(leaf) for leaf in jax.tree.leaves((saved.state, best.variables))], plain


def train_through_kills(task: str, moments: tuple[str, ...], flags: list[str], folders: list[Path]) -> None:
    """Starts the script once per moment, and once more to the end; nothing half written is left."""
    script = ROOT / "experiments" / f"train_{task}.py"
    for moment in moments:
        result = run_file(ROOT / "tests" / "fault_injection.py", moment, script, *flags)
        assert result.returncode == -signal.SIGKILL, (moment, result.stderr)
    result = run_script(f"train_{task}", *flags)
    assert result.returncode == 0, result.stderr
    left = [path for folder in folders for path in folder.rglob("*")]
    assert not [path for path in left if re.search(r"partial|deleted|tmp|lock-", path.name)]
    assert all(path.stat().st_size == 0 for path in left if path.name == ".lock")


def assert_same_outcome(killed: Path, whole: Path, epochs: int) -> None:
    (arrays, records), (expected_arrays, expected_records) = outcome(killed), outcome(whole)
    assert records == expected_records
    assert [record["epoch"] for record in records] == list(range(1, epochs + 1))
    for array, expected in zip(arrays, expected_arrays, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_killed_training_ends_where_an_uninterrupted_one_does(trained: Trained, tmp_path: Path) -> None:
    """The one that all tests use, killed in its first epoch, at its first checkpoint, and at its last validation."""
    changes = non_defaults(Config(**TINY))
    flags = [
        f"--data_dir={trained.data}",
        f"--split_file={trained.split_file}",
        f"--workdir={tmp_path / 'killed'}",
        f"--cache_dir={tmp_path / 'cache'}",
        *(f"--set={path}={json.dumps(value)}" for path, value in changes.items()),
    ]
    moments = ("a step of the first epoch", "the first checkpoint", "a later validation")
    train_through_kills("lung", moments, flags, [tmp_path / "killed", tmp_path / "cache"])
    assert_same_outcome(tmp_path / "killed", trained.lung, TINY["train"].epochs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["lung", "infection"])
def test_killed_at_each_moment_ends_where_an_uninterrupted_one_does(
    task: str, trained: Trained, tmp_path: Path
) -> None:
    killed, whole, cache = (tmp_path / name for name in ("killed", "whole", "cache"))
    flags = training_flags(task, trained, killed, cache, epochs=12)
    train_through_kills(task, tuple(MOMENTS), flags, [killed, cache])
    result = run_script(f"train_{task}", *training_flags(task, trained, whole, trained.cache, epochs=12))
    assert result.returncode == 0, result.stderr
    assert_same_outcome(killed, whole, 12)
