"""One training on several devices, and several trainings on one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from resunet_jax.errors import InputError
from resunet_jax.training.devices import make_mesh
from tests.conftest import ROOT, TINY_FLAGS, Trained, run_script

STEPS = 20
CODE = """
import json, sys
from pathlib import Path
import jax
from resunet_jax.config import Config, ModelConfig, PreprocessConfig, TrainConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.batches import SliceSource
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.errors import StoppedError
from resunet_jax.training.checkpoints import Checkpoints
from resunet_jax.training.devices import make_mesh
from resunet_jax.training.loop import fit
from resunet_jax.training.step import create_state, make_optimizer

data, cache, root = map(Path, sys.argv[1:4])
steps, *counts = map(int, sys.argv[4:])
preprocess = PreprocessConfig(image_size=32)
prepared = prepare_cases(find_cases(data), preprocess, cache)
source = SliceSource(prepared * 3, "lung")  # more than 20 steps an epoch
# A low rate: rounding, which differs by the number of devices, grows with each step.
plain = TrainConfig(batch_size=8, schedule="step", learning_rate=2e-4, weight_decay=0.0, loss="bce")
config = Config(preprocess=preprocess, model=ModelConfig(filters=(4, 8, 16, 32)), train=plain)
losses = {}
for count in counts:
    workdir = root / str(count)
    try:
        fit(config, source, None, workdir, mesh=make_mesh(count, 8), should_stop=lambda step: step == steps)
    except StoppedError:
        with Checkpoints(workdir) as checkpoints:
            saved = checkpoints.restore_latest(create_state(config, make_optimizer(config, 99)))
        losses[count] = saved.partial_epoch["losses"]
print(json.dumps(losses))
"""


@pytest.mark.parametrize("counts", ["14", pytest.param("1248", marks=pytest.mark.exhaustive)])
def test_any_number_of_devices_gives_the_same_losses(trained: Trained, tmp_path: Path, counts: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", CODE, trained.data, trained.cache, tmp_path, str(STEPS), *counts]
    environment = {**os.environ, "XLA_FLAGS": flags}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    losses = json.loads(result.stdout)
    assert list(losses) == list(counts)
    assert [len(values) for values in losses.values()] == [STEPS] * len(counts)
    for values in losses.values():
        np.testing.assert_allclose(values, losses["1"], rtol=1e-5)
    assert losses["1"][-1] < losses["1"][0] - 0.01  # it learns, so the steps are not one and the same


def test_devices_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(InputError, match=r"`devices=99`: this machine has \d+; give 1 to \d+, or all"):
        make_mesh(99, 8)
    with pytest.raises(InputError, match="`devices=0`"):
        make_mesh(0, 8)
    assert make_mesh(None, 8 * jax.device_count()).size == jax.device_count()


class Pair:
    """Two processes of one training on this machine."""

    def __init__(self, *flags: object) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        common = (f"--coordinator_address={address}", "--num_processes=2", *map(str, flags))
        script = ROOT / "experiments" / "train_lung.py"
        self.processes = [
            subprocess.Popen([sys.executable, script, *common, f"--process_id={i}"], stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]

    def wait(self, timeout: float = 300) -> tuple[list[int], list[str]]:
        errors = [process.communicate(timeout=timeout)[1] for process in self.processes]
        return [process.returncode for process in self.processes], errors


@pytest.mark.exhaustive
def test_two_processes_are_one_and_resume_when_one_was_killed(trained: Trained, tmp_path: Path) -> None:
    flags = [f"--data_dir={trained.data}", f"--cache_dir={trained.cache}", f"--split_file={trained.split_file}"]
    flags += [flag for flag in TINY_FLAGS if "rate" not in flag]
    flags += ["--recipe=original"]  # of which the number of epochs may grow
    pair_dir, one_dir = tmp_path / "pair", tmp_path / "one"

    pair = Pair(*flags, f"--workdir={pair_dir}", "--epochs=200", "--patience=200")
    metrics = pair_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert all(process.poll() is None for process in pair.processes), pair.wait()
        time.sleep(0.05)
    pair.processes[1].kill()
    codes, errors = pair.wait(timeout=60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert re.search("another (process|task)", errors[0]), errors[0]

    done = len(metrics.read_text().splitlines())
    epochs = done + 1
    codes, errors = Pair(*flags, f"--workdir={pair_dir}", f"--epochs={epochs}", "--patience=200").wait()
    assert codes == [0, 0], errors
    assert "resuming after epoch" in errors[0]
    assert "epoch" not in errors[1]  # one of them tells

    result = run_script("train_lung", *flags, f"--workdir={one_dir}", f"--epochs={epochs}", "--patience=200")
    assert result.returncode == 0, result.stderr
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (pair_dir, one_dir)]
    losses = [[json.loads(line)["train_loss"] for line in some] for some in lines]
    assert len(losses[0]) == epochs
    np.testing.assert_allclose(*losses, rtol=1e-5)
