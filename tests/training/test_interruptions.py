"""Trainings that are stopped, refused the disk, or started twice, as a user starts them."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from resunet_jax.weights.store import load_model
from tests.conftest import ROOT, Trained, run_script, training_flags


class Training:
    """A training of the lung model in the background."""

    def __init__(self, trained: Trained, workdir: Path, epochs: int = 1000) -> None:
        self.flags = training_flags("lung", trained, workdir, trained.cache, epochs)
        self.flags.append("--recipe=original")  # of which the number of epochs may grow
        self.metrics = workdir / "metrics.jsonl"
        self.errors = workdir.with_name("stderr.txt")
        script = ROOT / "experiments" / "train_lung.py"
        # Root may write anywhere, unless it gives that up.
        plain_user = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen([*plain_user, sys.executable, script, *self.flags], stderr=errors)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < end, self.errors.read_text()
            time.sleep(0.02)

    def wait_for_epochs(self, number: int) -> None:
        self.wait_for(lambda: self.metrics.exists() and len(self.metrics.read_text().splitlines()) >= number)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.errors.read_text())

    @contextlib.contextmanager
    def paused_between_saves(self) -> Iterator[None]:
        while True:
            self.process.send_signal(signal.SIGSTOP)
            if all(path.name.isdecimal() for path in self.metrics.with_name("checkpoints").iterdir()):
                break
            self.process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        yield
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=60)
        return code, self.errors.read_text()


@pytest.fixture
def start(trained: Trained, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    started: list[Training] = []

    def start_one(**changes) -> Training:
        started.append(Training(trained, tmp_path / "run", **changes))
        return started[-1]

    yield start_one
    for training in started:
        training.process.kill()
        training.process.wait()


def test_sigterm_saves_and_a_second_trainer_is_refused_meanwhile(start) -> None:
    training = start()
    training.wait_for_epochs(1)
    second = run_script("train_lung", *training.flags)
    assert second.returncode == 2
    assert re.search(rf"error: .*run: process {training.process.pid} on .* works in it", second.stderr)
    training.process.send_signal(signal.SIGTERM)
    code, errors = training.end()
    assert code == 75, errors
    assert "SIGTERM: stopping at the next step" in errors
    stopped = int(re.search(r"run: stopped after step (\d+); the same command resumes", errors)[1])

    training = start()
    training.wait_for_text("resuming")
    training.process.send_signal(signal.SIGINT)
    code, errors = training.end()
    assert code == 75, errors
    assert re.search(rf"resuming after epoch {stopped // 8}(, step {stopped})?\n", errors)
    assert int(re.search(r"stopped after step (\d+);", errors)[1]) > stopped


def test_second_signal_ends_at_once(start) -> None:
    training = start()
    training.wait_for_text("training and")  # compiling comes next
    training.process.send_signal(signal.SIGINT)
    training.wait_for_text("SIGINT: stopping at the next step; once more stops at once")
    training.process.send_signal(signal.SIGINT)
    code, errors = training.end()
    assert code == -signal.SIGINT
    assert "Traceback" not in errors


def fill_the_disk(training: Training, workdir: Path) -> None:
    """From now on the process can write no file longer than this: the same error at the same place as a full disk."""
    del workdir
    resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))


def make_read_only(training: Training, workdir: Path) -> None:
    del training
    (workdir / "checkpoints").chmod(0o555)


@pytest.mark.parametrize("hinder", [pytest.param(fill_the_disk, marks=pytest.mark.exhaustive), make_read_only])
def test_a_failed_write_is_reported_and_the_last_good_checkpoint_stays(
    start, tmp_path: Path, hinder: Callable[[Training, Path], None]
) -> None:
    training = start()
    training.wait_for_epochs(2)
    with training.paused_between_saves():
        hinder(training, tmp_path / "run")
    code, errors = training.end()
    assert code == 2, errors
    assert len(re.findall(r"^error: .*cannot be written \(", errors, re.MULTILINE)) == 1, errors
    assert "Traceback" not in errors
    (tmp_path / "run" / "checkpoints").chmod(0o755)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_model(tmp_path / "run").variables))
    done = len(training.metrics.read_text().splitlines())
    training = start(epochs=done + 1)
    code, errors = training.end()
    assert code == 0, errors
    assert "resuming after epoch" in errors
    epochs = [json.loads(line)["epoch"] for line in training.metrics.read_text().splitlines()]
    assert epochs == list(range(1, done + 2))
    shutil.rmtree(tmp_path / "run")
