"""Trainings that are killed at any moment and started again, as a user starts them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from resunet_jax.config import from_dict
from resunet_jax.training.checkpoints import Checkpoints
from resunet_jax.training.step import create_state, make_optimizer
from resunet_jax.weights.store import load_model
from tests.conftest import ROOT, Trained, run_script, training_flags
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


SOME = ("a step of the first epoch", "the first checkpoint", "a later validation")
EVERY = [pytest.param(task, tuple(MOMENTS), marks=pytest.mark.exhaustive) for task in ("lung", "infection")]


@pytest.mark.parametrize(("task", "moments"), [("infection", SOME), *EVERY])
def test_killed_training_ends_where_an_uninterrupted_one_does(
    task: str, moments: tuple[str, ...], trained: Trained, tmp_path: Path
) -> None:
    flags = training_flags(task, trained, tmp_path / "killed", tmp_path / "cache", epochs=12)
    script = ROOT / "experiments" / f"train_{task}.py"
    for moment in moments:
        command = [sys.executable, ROOT / "tests" / "fault_injection.py", moment, script, *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == -signal.SIGKILL, (moment, result.stderr)
    result = run_script(f"train_{task}", *flags)
    assert result.returncode == 0, result.stderr
    left = [path.name for folder in ("killed", "cache") for path in (tmp_path / folder).rglob("*")]
    assert not [name for name in left if re.search(r"partial|deleted|tmp|lock-", name)]

    whole = run_script(f"train_{task}", *training_flags(task, trained, tmp_path / "whole", trained.cache, epochs=12))
    assert whole.returncode == 0, whole.stderr
    (arrays, records), (expected_arrays, expected_records) = outcome(tmp_path / "killed"), outcome(tmp_path / "whole")
    assert records == expected_records
    assert [record["epoch"] for record in records] == list(range(1, 13))
    for array, expected in zip(arrays, expected_arrays, strict=True):
        np.testing.assert_array_equal(array, expected)
