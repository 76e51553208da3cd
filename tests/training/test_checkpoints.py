"""Checkpoints that were damaged, or written by an older version, and thresholds chosen for another one."""

import functools
import itertools
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from resunet_jax.config import Config, ModelConfig, PreprocessConfig, TrainConfig
from resunet_jax.errors import InputError
from resunet_jax.training.checkpoints import Checkpoints, RestoredState
from resunet_jax.training.step import TrainState, create_state, make_optimizer
from resunet_jax.weights import store
from resunet_jax.weights.store import (
    fingerprint,
    load_model,
    load_threshold,
    save_model,
    save_threshold,
)
from tests.conftest import REFERENCE

CONFIG = Config(
    preprocess=PreprocessConfig(image_size=16), model=ModelConfig(filters=(1, 1, 1, 1)), train=TrainConfig(epochs=9)
)


@functools.cache
def state(step: int) -> TrainState:
    """As many steps taken; other values at each step."""
    if step > 0:
        changed = jax.tree.map(lambda leaf: leaf + step, state(0))
    else:
        changed = jax.tree.map(np.asarray, create_state(CONFIG, make_optimizer(CONFIG, 4)))
    return changed.replace(step=np.int32(step))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four epochs; the second is the best."""
    folder = tmp_path_factory.mktemp("run")
    history = []
    with Checkpoints(folder) as checkpoints:
        for epoch, val_loss in enumerate((3.0, 1.0, 2.0, 2.5), start=1):
            history.append({"epoch": epoch, "step": 4 * epoch, "val_loss": val_loss})
            checkpoints.save(state(4 * epoch), CONFIG, history, None)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "16", "8"]
    return folder


def restore(folder: Path) -> RestoredState:
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_latest(state(0))


def assert_is_step(saved: RestoredState, step: int) -> None:
    assert [record["step"] for record in saved.history] == list(range(4, step + 1, 4))
    for leaf, expected in zip(jax.tree.leaves(saved.state), jax.tree.leaves(state(step)), strict=True):
        np.testing.assert_array_equal(leaf, expected)


Damage = Callable[[Path], None]


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit in each of five places."""
    content = bytearray(path.read_bytes())
    for place in np.linspace(0, len(content) - 1, 5, dtype=int):
        content[place] ^= 1 << int(place) % 7
    path.write_bytes(bytes(content))


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


DAMAGES = [delete, truncate, empty, flip]
# Each file in one way; the exhaustive run, in each.
EACH_DAMAGE = pytest.mark.parametrize(
    "damages",
    [DAMAGES, *(pytest.param([damage], marks=pytest.mark.exhaustive) for damage in DAMAGES)],
    ids=["interleaved", *(damage.__name__ for damage in DAMAGES)],
)


def damaged_files(folder: Path, damages: list[Damage]) -> Iterator[tuple[Path, Damage]]:
    return zip(files(folder), itertools.cycle(damages), strict=False)


@EACH_DAMAGE
def test_damage_anywhere_in_the_latest_is_noticed(
    workdir: Path, tmp_path: Path, damages: list[Damage], caplog: pytest.LogCaptureFixture
) -> None:
    for file, damage in damaged_files(workdir / "checkpoints" / "16", damages):
        copy = tmp_path / "run"
        shutil.copytree(workdir, copy)
        damage(copy / "checkpoints" / "16" / file)
        caplog.clear()
        assert_is_step(restore(copy), 12)
        named = file.name if file.name == "files.json" else file
        assert f"{copy}/checkpoints/16: damaged ({named}: " in caplog.text, file
        assert "resuming from the checkpoint of step 12" in caplog.text
        assert (copy / "damaged_checkpoints" / "16").is_dir()
        assert not (copy / "checkpoints" / "16").exists()
        assert fingerprint(load_model(copy).variables) == fingerprint(state(8).variables)
        shutil.rmtree(copy)


def test_run_resumes_over_a_damaged_checkpoint(workdir: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    delete(tmp_path / "run" / "checkpoints" / "16" / "history.json")
    with Checkpoints(tmp_path / "run") as checkpoints:
        history = [*checkpoints.restore_latest(state(0)).history, {"epoch": 4, "step": 16, "val_loss": 0.5}]
        checkpoints.save(state(16), CONFIG, history, None)
    assert_is_step(restore(tmp_path / "run"), 16)
    assert fingerprint(load_model(tmp_path / "run").variables) == fingerprint(state(16).variables)


def test_run_resumes_without_a_damaged_best_checkpoint(
    workdir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    truncate(tmp_path / "run" / "checkpoints" / "8" / "config.json")
    with Checkpoints(tmp_path / "run") as checkpoints:
        saved = checkpoints.restore_latest(state(0))
        assert_is_step(saved, 16)
        history = [*saved.history, {"epoch": 5, "step": 20, "val_loss": 2.2}]
        checkpoints.save(state(20), CONFIG, history, None)
        history = [*history, {"epoch": 6, "step": 24, "val_loss": 2.4}]
        checkpoints.save(state(24), CONFIG, history, None)
    assert "8: damaged (config.json: not what was written); it is left out" in caplog.text
    assert fingerprint(load_model(tmp_path / "run").variables) == fingerprint(state(12).variables)
    assert "its best checkpoint, of step 8, is missing; taking the best of the others, of step 12" in caplog.text


def test_what_others_put_beside_checkpoints_stays(tmp_path: Path) -> None:
    """Only what a killed process left goes."""
    for name in ("epoch_10", "8_keep", ".partial-machine-0-1-12345678-8", ".deleted"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "weights.pt").touch()
    with Checkpoints(tmp_path):
        pass
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"epoch_10", "8_keep"}


def test_where_none_is_good_nothing_is_trained_over(workdir: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    for step in (8, 12, 16):
        truncate(tmp_path / "run" / "checkpoints" / str(step) / "history.json")
    with pytest.raises(InputError, match=r"run: none of its checkpoints is good; choose a new `workdir`"):
        restore(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "16", "8"]


@EACH_DAMAGE
def test_damage_anywhere_in_the_best_model_is_refused(workdir: Path, tmp_path: Path, damages: list[Damage]) -> None:
    for file, damage in damaged_files(workdir / "checkpoints" / "8", damages):
        copy = tmp_path / "run"
        shutil.copytree(workdir, copy)
        damage(copy / "checkpoints" / "8" / file)
        with pytest.raises(InputError, match=rf"^{copy}/checkpoints/8: damaged \(.*; use a copy of it, or train again"):
            load_model(copy)
        shutil.rmtree(copy)


@EACH_DAMAGE
def test_damage_anywhere_in_a_saved_model_is_refused(
    tmp_path: Path, damages: list[Damage], caplog: pytest.LogCaptureFixture
) -> None:
    variables = state(1).variables
    save_model(tmp_path / "model", variables, CONFIG)
    damaged = damaged_files(tmp_path / "model", damages)
    for file, damage in (*damaged, (Path("files.json"), delete)):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "model", copy)
        damage(copy / file)
        caplog.clear()
        if file.name == "files.json" and damage is delete:
            assert fingerprint(load_model(copy).variables) == fingerprint(variables)
            assert "nobody can tell" in caplog.text
        else:
            with pytest.raises(InputError, match=rf"^{copy}: damaged \("):
                load_model(copy)
        shutil.rmtree(copy)


def test_training_of_the_first_version_can_be_used_but_not_resumed(tmp_path: Path) -> None:
    """Its checkpoint has no digests, and its config lacks fields that came later."""
    with zipfile.ZipFile(REFERENCE / "workdir_0_1_0.zip") as archive:
        archive.extractall(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.model.filters == (1, 1, 1, 1)
    assert "skip_nonfinite" not in json.loads((tmp_path / "config.json").read_text())["train"]
    assert not loaded.config.train.skip_nonfinite
    logits = jax.jit(functools.partial(loaded.model.apply, train=False))(
        loaded.variables, np.full((1, 16, 16, 1), 0.5, np.float32)
    )
    assert np.isfinite(logits).all()
    with pytest.raises(InputError, match=r"was written by resunet_jax 0\.1\.0 .* choose a new `workdir`"):
        restore(tmp_path)


class Rotating:
    """A training whose every epoch is the best, and of which only the best and the two latest checkpoints are there."""

    def __init__(self, workdir: Path) -> None:
        self.workdir, self.history = workdir, []
        for _ in range(3):
            self.save()

    def save(self) -> None:
        number = len(self.history) + 1
        self.history.append({"epoch": number, "step": number, "val_loss": 1 / number})
        with Checkpoints(self.workdir) as checkpoints:
            checkpoints.save(state(number), CONFIG, self.history, None)


@pytest.mark.parametrize("moment", ["verify_folder", "_digests", "read_values", "_load_folder", "restore_tree"])
def test_a_model_is_restored_while_its_training_rotates_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whichever is the best at the moment; what has vanished under the reader is not "damaged"."""
    training, real = Rotating(tmp_path / "run"), getattr(store, moment)
    save_threshold(training.workdir, 0.4, 0.8, ["a"])

    def rotate_first(*args: Any) -> Any:
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(store, moment, real)
            if len(training.history) < 6:
                for _ in range(3):
                    training.save()
        return real(*args)

    monkeypatch.setattr(store, moment, rotate_first)
    assert fingerprint(load_model(training.workdir).variables) == fingerprint(state(6).variables)
    del training.history[3:]
    if moment in ("verify_folder", "_digests", "read_values"):
        with pytest.raises(InputError, match="which is not the best any more"):
            load_threshold(training.workdir)


def test_a_model_is_restored_again_and_again_beside_its_training(tmp_path: Path) -> None:
    training, stop = Rotating(tmp_path / "run"), threading.Event()

    def rotate() -> None:
        while not stop.is_set():
            training.save()

    with ThreadPoolExecutor(1) as executor:
        rotating = executor.submit(rotate)
        try:
            for _ in range(8):
                load_model(training.workdir)
        finally:
            stop.set()
        rotating.result()


def test_threshold_belongs_to_the_checkpoint_that_it_was_chosen_for(workdir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    save_threshold(folder, 0.35, 0.8, ["a"])
    values = {"threshold": 0.35, "mean_dice": 0.8, "chosen_on": ["a"], "step": 8}
    assert json.loads((folder / "threshold.json").read_text()) == values
    assert load_threshold(folder) == 0.35
    with Checkpoints(folder) as checkpoints:
        history = [*checkpoints.restore_latest(state(0)).history, {"epoch": 5, "step": 20, "val_loss": 1.0}]
        checkpoints.save(state(20), CONFIG, history, None)
    assert load_threshold(folder) == 0.35  # of two equal ones the first is the best
    with Checkpoints(folder) as checkpoints:
        history = [*history, {"epoch": 6, "step": 24, "val_loss": 0.5}]
        checkpoints.save(state(24), CONFIG, history, None)
    with pytest.raises(InputError, match="chosen for the checkpoint of step 8, which is not the best any more"):
        load_threshold(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, f'{{"threshold": {10**400}}}', '{"threshold": 1.0}', "{}"])
def test_what_holds_no_threshold_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "threshold.json").write_text(text)
    with pytest.raises(InputError, match=r"threshold\.json: holds no threshold in \(0, 1\)"):
        load_threshold(tmp_path)


def test_thresholds_of_0_6_0_name_no_checkpoint_and_are_used(tmp_path: Path) -> None:
    (tmp_path / "threshold.json").write_text('{"threshold": 0.4, "mean_dice": 0.9, "chosen_on": ["a"]}')
    assert load_threshold(tmp_path) == 0.4
