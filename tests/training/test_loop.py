import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax import __version__
from resunet_jax.config import (
    ALIASES,
    UNKNOWN_PATIENTS,
    AugmentConfig,
    Config,
    ModelConfig,
    TrainConfig,
    from_dict,
    override,
    to_dict,
)
from resunet_jax.data import batches
from resunet_jax.data.batches import ProcessShard, SliceSource, eval_batches
from resunet_jax.data.cases import find_cases
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.data.splits import SplitRequest
from resunet_jax.errors import InputError, StoppedError
from resunet_jax.inference.predictor import Predictor
from resunet_jax.model.build import ARCHITECTURES
from resunet_jax.training import loop as module
from resunet_jax.training import train as train_module
from resunet_jax.training.augment import AUGMENTATIONS
from resunet_jax.training.checkpoints import Checkpoints
from resunet_jax.training.devices import make_mesh
from resunet_jax.training.loop import evaluate_sums, finished, fit
from resunet_jax.training.losses import LOSSES, make_loss, mean_over_examples
from resunet_jax.training.step import create_state, make_eval_step, make_optimizer
from resunet_jax.training.train import train, versions
from resunet_jax.weights.store import fingerprint, load_model, load_model_for, save_model
from tests.conftest import TINY, WITH_CONTEXT, Trained


def tiny(epochs: int, **train_changes) -> Config:
    return Config(**{**TINY, "train": dataclasses.replace(TINY["train"], epochs=epochs, **train_changes)})


@pytest.fixture(scope="module")
def sources(trained: Trained):
    cases = {case.id: case for case in find_cases(trained.data)}
    names = ("radiopaedia_10_85902_1", "coronacases_002")
    prepared = prepare_cases([cases[name] for name in names], TINY["preprocess"], trained.cache)
    return [SliceSource([one], "lung") for one in prepared]


_COMPILED: dict = {}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one config share its steps, whatever their number of epochs."""
    real = module._jitted_steps

    def jitted_steps(config: Config, optimizer, lung, mesh, losses, *tables):
        if lung is not None or losses is not LOSSES:
            return real(config, optimizer, lung, mesh, losses, *tables)
        assert config.train.schedule == "step"
        key = override(config, {"train.epochs": 1, "train.patience": 1}), mesh
        if key not in _COMPILED:
            _COMPILED[key] = real(config, optimizer, lung, mesh, losses, *tables)
        return _COMPILED[key]

    monkeypatch.setattr(module, "_jitted_steps", jitted_steps)


def parameters(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(workdir).variables)]


def without_times(path: Path) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if "second" not in k} for record in records]


STEPS = 3  # an epoch: 9 slices, 4 a step


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs without an interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    assert [record["step"] for record in fit(tiny(3), *sources, workdir)] == [STEPS, 2 * STEPS, 3 * STEPS]
    return workdir


def latest(workdir: Path, config: Config | None = None):
    """Everything in the latest checkpoint."""
    config = config or tiny(3)
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(create_state(config, make_optimizer(config, STEPS)))


def assert_same_run(a: Path, b: Path) -> None:
    """Every byte of the latest state and of the best model, and every record but for the times."""
    for one, other in zip(jax.tree.leaves(latest(a).state), jax.tree.leaves(latest(b).state), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(parameters(a), parameters(b), strict=True):
        np.testing.assert_array_equal(one, other)
    assert without_times(a) == without_times(b)


def test_same_seed_gives_the_same_bytes(whole, sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_READ", grain.ReadOptions(num_threads=4, prefetch_buffer_size=16))
    fit(tiny(3), *sources, tmp_path)
    assert_same_run(whole, tmp_path)


def test_resumed_ends_where_uninterrupted_does(whole, sources, tmp_path: Path) -> None:
    fit(tiny(1), *sources, tmp_path)
    fit(tiny(3), *sources, tmp_path)
    assert_same_run(whole, tmp_path)
    assert [record["epoch"] for record in without_times(tmp_path)] == [1, 2, 3]


def loss_sums(value: float) -> dict[str, dict[str, float]]:
    """Of which the binary cross-entropy is this."""
    return {"bce": {"total": value, "examples": 1.0}}


def test_best_and_latest_are_kept_and_the_best_is_loaded(
    sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val_losses = iter([3.0, 1.0, 2.0, 2.5, 1.5])
    real = module.evaluate_sums
    monkeypatch.setattr(module, "evaluate_sums", lambda *args: {**real(*args), "loss": loss_sums(next(val_losses))})
    fit(tiny(2), *sources, tmp_path)
    second = parameters(tmp_path)
    fit(tiny(5), *sources, tmp_path)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    per_epoch = steps[-1] // 5
    assert steps == [2 * per_epoch, 4 * per_epoch, 5 * per_epoch]
    for a, b in zip(second, parameters(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_validation_the_last_epoch_is_kept(sources, tmp_path: Path) -> None:
    with_validation, without = tmp_path / "with", tmp_path / "without"
    history = fit(tiny(2, patience=1), sources[0], None, without)
    assert [record["val_loss"] for record in history] == [None, None]
    assert [record["val_dice"] for record in history] == [None, None]
    latest_variables = jax.tree.leaves(latest(without, tiny(2, patience=1)).state.model_variables)
    for a, b in zip(latest_variables, parameters(without), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [record["train_loss"] for record in fit(tiny(2), *sources, with_validation)]
    assert [record["train_loss"] for record in history] == losses


def test_stops_after_patience() -> None:
    def history(*losses: float | None):
        return [{"val_loss": loss} for loss in losses]

    config = tiny(100, patience=2)
    assert not finished(config, [])
    assert not finished(config, history(3, 2, 2.5))
    assert finished(config, history(3, 2, 2.5, 2.1))
    assert not finished(config, history(3, 2, 2.5, 1.9))
    assert finished(tiny(2, patience=5), history(3, 2))
    assert not finished(config, history(None, None, None, None))


def test_non_finite_loss_stops_and_leaves_the_last_checkpoint(sources, tmp_path: Path) -> None:
    fit(tiny(1), *sources, tmp_path)
    before, lines = parameters(tmp_path), (tmp_path / "metrics.jsonl").read_text()

    named = (
        r"the loss is nan at step \d+, in one of (.*, )?radiopaedia_10_85902_1 slice 5(, .*)? \(learning rate 0.003\)"
    )
    with pytest.raises(InputError, match=rf"{named}.*`skip_nonfinite`"):
        fit(tiny(2), corrupted(sources[0], [5]), sources[1], tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    for a, b in zip(before, parameters(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


def corrupted(source: SliceSource, numbers: list[int], factor: float = np.nan) -> SliceSource:
    """The source with some slices multiplied by a factor."""

    class Corrupted(SliceSource):
        def batch(self, indices: np.ndarray, size: int):
            batch = super().batch(indices, size)
            hit = np.isin(batch["index"], numbers) & batch["valid"]
            image = np.where(hit[:, None, None, None], batch["image"] * np.float32(factor), batch["image"])
            return {**batch, "image": image}

    copy = Corrupted.__new__(Corrupted)
    copy.__dict__ = source.__dict__
    return copy


def test_steps_that_are_not_finite_can_be_left_out(sources, tmp_path: Path) -> None:
    config = tiny(2, skip_nonfinite=True)
    history = fit(config, corrupted(sources[0], [5]), sources[1], tmp_path / "one")
    assert all(record["skipped_steps"] == 1 for record in history)
    assert all(np.isfinite(leaf).all() for leaf in parameters(tmp_path / "one"))
    assert 0 < history[-1]["train_loss"] < history[0]["train_loss"]
    slices = sum(history[0][f"train_{name}"] is not None for name in ("dice", "recall"))
    assert slices == 2
    untouched = fit(config, *sources, tmp_path / "none")
    plain = fit(tiny(2), *sources, tmp_path / "plain")
    losses = ([record["train_loss"] for record in run] for run in (untouched, plain))
    np.testing.assert_allclose(*losses, rtol=1e-6)  # two programs, which round differently
    with pytest.raises(InputError, match=f"{STEPS} steps in a row were not finite, up to step {STEPS} ") as error:
        fit(tiny(9, skip_nonfinite=True), corrupted(sources[0], list(range(99))), sources[1], tmp_path / "all")
    with pytest.raises(InputError, match="the loss is nan in validation after epoch 1 ") as in_validation:
        fit(tiny(1, skip_nonfinite=True), sources[0], corrupted(sources[1], [5]), tmp_path / "validation")
    for raised in (error, in_validation):  # nothing is advised that is done already
        assert str(raised.value).endswith("is untouched; try a lower `learning_rate` in a new `workdir`")


def test_gradient_that_is_not_finite_is_reported(sources, tmp_path: Path) -> None:
    @jax.custom_vjp
    def loss(logits: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.zeros(logits.shape[0]) + 0 * target.sum((1, 2, 3))

    loss.defvjp(lambda x, y: (loss(x, y), (x, y)), lambda saved, _: (jnp.full_like(saved[0], jnp.inf), saved[1]))
    losses = LOSSES | {"steep": mean_over_examples(loss)}
    with pytest.raises(InputError, match="a gradient is not finite at step 1, in one of radiopaedia_10_85902_1 slice"):
        fit(tiny(1, loss="steep"), *sources, tmp_path, losses=losses)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7, 3 * STEPS])
def test_stopped_and_resumed_ends_where_uninterrupted_does(whole, sources, tmp_path: Path, stop_after: int) -> None:
    asked = []

    def should_stop(step: int) -> bool:
        asked.append(step)
        return step == stop_after

    if stop_after < 3 * STEPS:
        with pytest.raises(StoppedError, match=rf"stopped after step {stop_after}; the same command resumes"):
            fit(tiny(3), *sources, tmp_path, should_stop=should_stop)
        assert asked == list(range(1, stop_after + 1))
    else:  # the training is over
        fit(tiny(3), *sources, tmp_path, should_stop=should_stop)
    fit(tiny(3), *sources, tmp_path)
    assert_same_run(whole, tmp_path)


class Plain(nn.Module):
    """Without batch normalisation, for slices of its own size alone."""

    size: int
    in_channels: int = 1
    closing_fraction: float = 0.0
    convolution: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        assert x.shape[1:3] == (self.size, self.size)
        return nn.Conv(1, (3, 3))(nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x))))


def test_an_architecture_may_have_no_batch_statistics_and_its_own_size(sources, tmp_path: Path) -> None:
    architectures = ARCHITECTURES | {"plain": lambda config, _: Plain(config.preprocess.image_size)}
    config = override(tiny(2), {"model.architecture": "plain", "train.skip_nonfinite": True})
    fit(override(config, {"train.epochs": 1}), *sources, tmp_path / "resumed", architectures=architectures)
    for name in ("resumed", "whole"):
        fit(config, *sources, tmp_path / name, architectures=architectures)
    resumed, uninterrupted = (load_model(tmp_path / name, architectures) for name in ("resumed", "whole"))
    assert resumed.variables["batch_stats"] == {}
    assert fingerprint(resumed.variables) == fingerprint(uninterrupted.variables)
    size = config.preprocess.image_size
    probability = Predictor(resumed, None).slice_probabilities(np.zeros((2, size, size, 1), np.float32))
    assert probability["lung"].shape == (2, size, size)


def test_fewer_steps_than_an_update_needs_are_refused(sources, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no update would be made"):
        fit(tiny(1, accumulate_steps=STEPS + 1), *sources, tmp_path)


def test_checkpoints_without_their_config_are_refused(trained: Trained, tmp_path: Path) -> None:
    """Of what run they are, nothing would tell."""
    shutil.copytree(trained.lung, tmp_path / "run")
    config = from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    (tmp_path / "run" / "config.json").unlink()
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        train(other, trained.data, tmp_path / "run", trained.cache, split=SplitRequest(trained.split_file))


def test_run_folder_explains_itself(trained: Trained) -> None:
    for workdir, task in ((trained.lung, "lung"), (trained.infection, "infection")):
        names = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if "checkpoints" not in str(path)}
        assert names >= {
            "config.json",
            "split.json",
            "versions.json",
            "metrics.jsonl",
            "threshold.json",
            "figures/loss_curves.png",
            "figures/validation_samples.png",
            "figures/augmented_batch.png",
            "figures/roi_steps.png",
        }
        assert json.loads((workdir / "config.json").read_text())["task"] == task
        assert json.loads((workdir / "split.json").read_text()) == json.loads(trained.split_file.read_text())
        assert json.loads((workdir / "versions.json").read_text())["jax"] == jax.__version__
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert 0 <= record["data_wait_seconds"] <= record["seconds"]


def test_another_run_in_the_same_folder_is_refused(trained: Trained) -> None:
    def again(config: Config, **changes) -> None:
        train(
            config, trained.data, trained.lung, trained.cache, **{"split": SplitRequest(trained.split_file), **changes}
        )

    with pytest.raises(InputError, match=r"train\.loss was bce, is dice"):
        again(tiny(2, loss="dice"))
    with pytest.raises(InputError, match=r"run \(augment\.max_scale was 0\.0, is 0\.1\);"):  # by one name
        again(override(tiny(2), {"augment.max_scale": 0.1}))
    with pytest.raises(InputError, match=r"train\.schedule was step, is one_cycle"):
        again(tiny(2, schedule="one_cycle"))
    with pytest.raises(InputError, match="another split"):
        again(tiny(2), split=SplitRequest(split_seed=1))
    again(tiny(2))  # the same command: nothing left to do


def test_a_workdir_that_is_no_run_is_left_as_it_is(trained: Trained, tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        before = contents(tmp_path / name)
        with pytest.raises(InputError, match=message):
            train(tiny(1), trained.data, tmp_path / name, trained.cache, split=SplitRequest(trained.split_file))
        assert contents(tmp_path / name) == before

    loaded = load_model(trained.lung)
    save_model(tmp_path / "model", loaded.variables, loaded.config)
    refused("model", "model: is a saved model; choose a new `workdir`")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Unet"]}')
    refused("other", r"config\.json: there is no architectures")
    shutil.copytree(trained.lung, tmp_path / "run")
    (tmp_path / "run" / "split.json").unlink()
    refused("run", r"split\.json: is missing, .* choose a new `workdir`")


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(trained: Trained, tmp_path: Path, fitted) -> None:
    for config in (tiny(1), override(tiny(1), {"preprocess.image_size": 48})):
        with pytest.raises(StopError):
            train(config, trained.data, tmp_path, trained.cache, split=SplitRequest(trained.split_file))
    first, second = (config.preprocess.image_size for config, _ in fitted)
    assert (first, second) == (32, 48)


def test_the_threshold_names_the_cases_that_it_was_chosen_on(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the validation cases those with the structure."""
    (tmp_path / "split.json").write_text(
        '{"train": ["coronacases_001"], "val": ["coronacases_002", "coronacases_003"], "test": []}'
    )
    real = train_module.read_mask

    def read_mask(path: Path, *arguments):
        mask = real(path, *arguments)
        return mask * 0 if path.name.startswith("coronacases_003") else mask

    monkeypatch.setattr(train_module, "read_mask", read_mask)
    train(tiny(1), trained.data, tmp_path / "run", trained.cache, split=SplitRequest(tmp_path / "split.json"))
    threshold = json.loads((tmp_path / "run" / "threshold.json").read_text())
    assert threshold["chosen_on"] == ["coronacases_002"]


def test_the_seed_decides_parameters_and_augmentation() -> None:
    """Not the order of slices alone, which would hide that these stay the same."""
    configs = [tiny(1, seed=seed) for seed in (0, 1)]
    optimizer = make_optimizer(configs[0], STEPS)
    fingerprints = {fingerprint(create_state(config, optimizer).variables) for config in configs}
    tables = LOSSES, AUGMENTATIONS, ARCHITECTURES
    steps = [module._jitted_steps(config, optimizer, None, make_mesh(1, 4), *tables)[0] for config in configs]
    keys = {jax.random.key_data(step.keywords["key"]).tobytes() for step in steps}
    assert (len(fingerprints), len(keys)) == (2, 2)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def begun_by_0_6_0(workdir: Path, config: Config) -> dict:
    """Lets a run seem so: its config.json has the old names alone, and no version."""
    values = to_dict(config)
    del values["version"]
    for old, new in ALIASES.items():
        section, name = new.split(".")
        values[section].pop(name, None)
        assert old.split(".")[1] in values[old.split(".")[0]]
    for section in ("cascade", "postprocess"):
        del values[section]
    for name in ("architecture", "mirroring", "context_averaging"):
        del values["model"][name]
    del values["augment"]["transforms"]
    (workdir / "config.json").write_text(json.dumps(values))
    return values


def test_a_run_begun_by_0_6_0_is_refused_in_one_line(trained: Trained, tmp_path: Path) -> None:
    workdir = tmp_path / "lung"
    shutil.copytree(trained.lung, workdir)
    values = begun_by_0_6_0(workdir, tiny(2))
    assert values["model"] == {"filters": [4, 8, 16, 32], "dtype": "float32", "lung_closing": 0.125}
    assert values["predict"] == {"smallest_region": 0.0}
    before = contents(workdir)
    with pytest.raises(InputError, match=r"lung: was begun by resunet_jax 0\.6\.0 or older.*new `workdir`") as refused:
        train(tiny(2), trained.data, workdir, trained.cache, split=SplitRequest(trained.split_file))
    assert "\n" not in str(refused.value)
    assert contents(workdir) == before
    assert fingerprint(load_model(workdir).variables) == fingerprint(load_model(trained.lung).variables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(loss="toy:1")}, "loss 'toy:1': 'toy' is not one of bce"),
        ({"augment": AugmentConfig(transforms=("toy",))}, "augmentation 'toy': "),
        ({"model": ModelConfig(architecture="toy")}, "architecture 'toy': "),
    ],
)
def test_names_that_the_tables_lack_are_reported_before_data_is_touched(
    tmp_path: Path, changes: dict, message: str
) -> None:
    paths = (tmp_path / "no data", tmp_path / "run", tmp_path / "cache")
    with pytest.raises(InputError, match=message):
        train(Config(**changes), *paths)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no data"):  # with names that are there, the data is next
        train(Config(), *paths)


def test_validation_loss_does_not_depend_on_the_batch_size(trained: Trained, sources) -> None:
    """Nor on padding: 12 slices in batches of 5 leave three places empty."""
    loaded = load_model(trained.lung)
    share = ProcessShard(lambda batch: batch)
    for terms in ("bce:1,pooled_dice:1", "dice"):
        config = tiny(1, loss=terms)
        step = jax.jit(lambda variables, batch, config=config: make_eval_step(config)(variables, batch, None))
        sums = {
            size: evaluate_sums(step, loaded.variables, eval_batches(sources[1], size, share)) for size in (1, 5, 12)
        }
        losses = {size: make_loss(terms).value(total["loss"]) for size, total in sums.items()}
        np.testing.assert_allclose(list(losses.values()), losses[12], rtol=1e-6)
        assert len({tuple(total[name] for name in ("tp", "fp", "fn", "tn")) for total in sums.values()}) == 1
    assert len(sources[1]) == 12


class StopError(Exception):
    """Ends a training before it begins."""


def test_a_run_of_one_cycle_cannot_grow(trained: Trained, tmp_path: Path) -> None:
    """The rate of a cycle depends on its length, so that a longer one is another run."""
    shutil.copytree(trained.lung, tmp_path / "lung")
    config = override(Config(**TINY), {"train.schedule": "one_cycle"})
    (tmp_path / "lung" / "config.json").write_text(json.dumps(to_dict(config)))
    longer = override(config, {"train.epochs": config.train.epochs + 1})
    with pytest.raises(InputError, match=r"train\.epochs was 2, is 3"):
        train(longer, trained.data, tmp_path / "lung", trained.cache, split=SplitRequest(trained.split_file))


def test_a_run_cannot_end_before_what_is_done(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.lung, tmp_path / "lung")
    config = load_model(trained.lung).config
    assert (config.train.schedule, config.train.epochs) == ("step", 2)
    shorter = override(config, {"train.epochs": 1})
    with pytest.raises(InputError, match="2 epochs are done, `epochs` is 1; choose a new `workdir`"):
        train(shorter, trained.data, tmp_path / "lung", trained.cache, split=SplitRequest(trained.split_file))
    assert json.loads((tmp_path / "lung" / "config.json").read_text())["train"]["epochs"] == 2


def test_another_split_than_the_lungs_is_reported(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "split.json"
    other.write_text('{"train": ["coronacases_002"], "val": ["coronacases_001"], "test": []}')
    monkeypatch.setattr(train_module, "fit", lambda *_, **__: (_ for _ in ()).throw(StopError))
    monkeypatch.setattr(train_module, "_plot_inputs", lambda *_: None)
    config = dataclasses.replace(tiny(1), task="infection")
    for split_file, reported in ((trained.split_file, False), (other, True)):
        caplog.clear()
        with contextlib.suppress(StopError), caplog.at_level("WARNING", logger="resunet_jax"):
            paths = (trained.data, tmp_path / "run", trained.cache)
            train(config, *paths, split=SplitRequest(split_file), lung_checkpoint=trained.lung)
        assert ("differs from this split" in caplog.text) == reported


def test_models_restore_from_their_folder_alone(trained: Trained, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained.infection, moved)
    model, variables, config = load_model(moved)
    assert config.task == "infection"
    assert config.preprocess.image_size == 32
    assert config.lung_fingerprint == fingerprint(load_model(trained.lung).variables)
    logits = jax.jit(partial(model.apply, train=False))(variables, np.zeros((1, 32, 32, 4), np.float32))
    assert logits.shape == (1, 32, 32, 1)


def test_saved_model_round_trip(trained: Trained, tmp_path: Path) -> None:
    loaded = load_model(trained.lung)
    save_model(tmp_path / "model", loaded.variables, loaded.config)
    again = load_model(tmp_path / "model")
    assert again.config == loaded.config
    assert fingerprint(again.variables) == fingerprint(loaded.variables)
    with pytest.raises(InputError, match="exists already"):
        save_model(tmp_path / "model", loaded.variables, loaded.config)


def test_unfit_checkpoints_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load_model(tmp_path / "none")
    with pytest.raises(InputError, match="neither a training workdir nor a saved model"):
        load_model(tmp_path)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="no checkpoint in it yet"):
        load_model(tmp_path / "empty")
    with pytest.raises(InputError, match="expected a lung model, this one segments infection; give the other folder"):
        load_model_for(trained.infection, "lung")


def test_another_architecture_is_refused(trained: Trained, tmp_path: Path) -> None:
    loaded = load_model(trained.lung)
    save_model(tmp_path / "model", loaded.variables, loaded.config)
    config_file = tmp_path / "model" / "config.json"
    values = json.loads(config_file.read_text())
    values["model"]["filters"] = [8, 8, 16, 32]
    config_file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"damaged \(config.json: not what was written\)"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "files.json").unlink()
    with pytest.raises(InputError, match="another architecture"):
        load_model(tmp_path / "model")
    config_file.write_text("{")
    with pytest.raises(InputError, match=r"damaged \(config.json: "):
        load_model(tmp_path / "model")


def test_versions_of_what_is_not_installed_are_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "grain":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert (found["grain"], found["jax"], found["resunet-jax"]) == ("not installed", "1.0", __version__)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, dict[str, Any]]]:
    """What `fit` is called with; it ends the training."""
    calls: list[tuple[Config, dict[str, Any]]] = []

    def fit(config: Config, *_, **arguments) -> None:
        calls.append((config, arguments))
        raise StopError

    monkeypatch.setattr(train_module, "fit", fit)
    monkeypatch.setattr(train_module, "_plot_inputs", lambda *_: None)
    return calls


def fine_tune(trained: Trained, workdir: Path, config: Config, initial: str | Path, **arguments) -> None:
    split = arguments.pop("split", SplitRequest(trained.split_file))
    with contextlib.suppress(StopError):
        train(config, trained.data, workdir, trained.cache, split=split, initial_checkpoint=initial, **arguments)


def test_a_training_begins_with_a_trained_model(trained: Trained, tmp_path: Path, fitted) -> None:
    """Its patients count as the new model's: an evaluation on them is to be marked."""
    split = tmp_path / "split.json"
    split.write_text('{"train": ["coronacases_003"], "val": ["radiopaedia_14_85914_0"], "test": []}')
    first = load_model(trained.lung)
    fine_tune(trained, tmp_path / "run", tiny(1), trained.lung, split=SplitRequest(split))
    ((config, arguments),) = fitted
    assert config.initial_fingerprint == fingerprint(arguments["initial"].variables) == fingerprint(first.variables)
    assert set(config.train_patients) == {"coronacases_003", *first.config.train_patients}
    assert set(config.val_patients) == {"radiopaedia_14", *first.config.val_patients}
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(InputError, match=f"another run .initial_fingerprint was {config.initial_fingerprint}, is "):
        train(tiny(1), trained.data, tmp_path / "run", trained.cache, split=SplitRequest(split))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_state_begins_with_the_given_model(decay: float) -> None:
    """Before the lung model, whatever the config says of that."""
    config = override(tiny(1, ema_decay=decay), {"cascade.start_from_lung": True})
    optimizer = make_optimizer(config, STEPS)
    states = [create_state(override(config, {"train.seed": seed}), optimizer).variables for seed in (1, 2)]
    state = create_state(config, optimizer, lung_variables=states[0], initial_variables=states[1])
    for variables in (state.variables, state.model_variables):
        assert fingerprint(variables) == fingerprint(states[1])
    wider = override(config, {"model.filters": [8, 8, 16, 32]})
    with pytest.raises(ValueError, match="of another architecture or width"):
        create_state(wider, optimizer, initial_variables=states[1])


def test_patients_that_the_initial_model_has_seen_are_reported(
    trained: Trained, tmp_path: Path, fitted, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "split.json"
    other.write_text('{"train": ["coronacases_003"], "val": [], "test": ["coronacases_001", "coronacases_002"]}')
    for split, expected in ((trained.split_file, ""), (other, "has seen coronacases_001, coronacases_002, of this")):
        caplog.clear()
        with caplog.at_level("WARNING", logger="resunet_jax"):
            fine_tune(trained, tmp_path / split.parent.name, tiny(1), trained.lung, split=SplitRequest(split))
        assert [record.message for record in caplog.records if expected in record.message] == caplog.messages
        assert bool(caplog.messages) == bool(expected)
    assert len(fitted) == 2


def test_an_unfit_initial_model_is_refused(trained: Trained, tmp_path: Path, fitted) -> None:
    with pytest.raises(InputError, match="expected a lung model, this one segments infection; give the other folder"):
        fine_tune(trained, tmp_path / "a", tiny(1), trained.infection)
    wider = override(tiny(1), {"model.filters": [8, 8, 16, 32]})
    with pytest.raises(
        InputError, match=r"lung: the training .* which has filters \(4, 8, 16, 32\), not \(8, 8, 16, 32\);"
    ):
        fine_tune(trained, tmp_path / "b", wider, trained.lung)
    minmax = override(tiny(1), {"preprocess.normalization": "minmax"})
    with pytest.raises(InputError, match="which has normalization air, not minmax;"):
        fine_tune(trained, tmp_path / "c", minmax, trained.lung)
    other = override(tiny(1), {"model.architecture": "mine"})
    with pytest.raises(InputError, match="which has architecture resunet, not mine;"):
        tables = {"mine": ARCHITECTURES["resunet"], **ARCHITECTURES}
        fine_tune(trained, tmp_path / "e", other, trained.lung, architectures=tables)
    ct_only = dataclasses.replace(tiny(1), task="infection_ct", preprocess=WITH_CONTEXT)
    with pytest.raises(InputError, match="which has input channels 4, not 3;"):
        fine_tune(trained, tmp_path / "f", ct_only, trained.infection)
    assert not fitted
    larger = override(tiny(1), {"preprocess.image_size": 48})
    fine_tune(trained, tmp_path / "d", larger, trained.lung)
    assert len(fitted) == 1


def test_a_model_that_began_with_unknown_patients_says_so(trained: Trained, tmp_path: Path, fitted) -> None:
    loaded = load_model(trained.lung)
    save_model(tmp_path / "model", loaded.variables, dataclasses.replace(loaded.config, train_patients=()))
    fine_tune(trained, tmp_path / "run", tiny(1), tmp_path / "model")
    assert set(fitted[0][0].train_patients) == {UNKNOWN_PATIENTS, *loaded.config.train_patients}
    assert (fitted[0][0].lists_patients, loaded.config.lists_patients) == (False, True)
    assert not Config().lists_patients


@pytest.mark.parametrize(
    ("changes", "begins_with_lung"),
    [({"cascade.start_from_lung": True}, True), ({}, False), ({"model.filters": [8, 8, 16, 32]}, False)],
)
def test_patients_of_the_lung_model_that_it_begins_with_count_as_seen(
    trained: Trained, tmp_path: Path, fitted, changes: dict, begins_with_lung: bool
) -> None:
    (tmp_path / "split.json").write_text('{"train": ["coronacases_003"], "val": [], "test": ["coronacases_001"]}')
    config = override(dataclasses.replace(tiny(1), task="infection", preprocess=WITH_CONTEXT), changes)
    split = SplitRequest(tmp_path / "split.json")
    with contextlib.suppress(StopError):
        train(config, trained.data, tmp_path / "run", trained.cache, split=split, lung_checkpoint=trained.lung)
    lung = load_model(trained.lung).config
    seen = ({"coronacases_003", *lung.train_patients}, set(lung.val_patients))
    ((config, _),) = fitted
    assert (set(config.train_patients), set(config.val_patients)) == (
        seen if begins_with_lung else ({"coronacases_003"}, set())
    )


def test_fit_begins_with_the_initial_model(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def create(*arguments) -> None:
        states.append(create_state(*arguments))
        raise StopError

    monkeypatch.setattr(module, "create_state", create)
    monkeypatch.setattr(train_module, "_plot_inputs", lambda *_: None)
    fine_tune(trained, tmp_path / "run", tiny(1), trained.lung)
    assert fingerprint(states[0].variables) == fingerprint(load_model(trained.lung).variables)


def test_an_initial_model_of_a_plugin_below_the_home_folder(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted
) -> None:
    config = override(tiny(1), {"model.architecture": "mine"})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_model(tmp_path / "mine", load_model(trained.lung).variables, config)
    tables = {**ARCHITECTURES, "mine": ARCHITECTURES["resunet"]}
    fine_tune(trained, tmp_path / "run", config, "~/mine", architectures=tables)
    assert fitted[0][0].initial_fingerprint


@pytest.mark.parametrize(("subset", "seen"), [("val", "coronacases_001"), ("test", "coronacases_001, coronacases_002")])
def test_a_lung_model_that_began_with_held_out_patients_is_reported(
    trained: Trained, tmp_path: Path, fitted, caplog: pytest.LogCaptureFixture, subset: str, seen: str
) -> None:
    """Though its own split is this one; on the validation cases of both an epoch may be chosen."""
    cases = {"train": ["coronacases_003"], "val": [], "test": [], subset: ["coronacases_001", "coronacases_002"]}
    (tmp_path / "split.json").write_text(json.dumps(cases))
    shutil.copytree(trained.lung, tmp_path / "lung")
    shutil.copy(tmp_path / "split.json", tmp_path / "lung")
    config = dataclasses.replace(tiny(1), task="infection", preprocess=WITH_CONTEXT)
    split = SplitRequest(tmp_path / "split.json")
    with contextlib.suppress(StopError), caplog.at_level("WARNING", logger="resunet_jax"):
        train(config, trained.data, tmp_path / "run", trained.cache, split=split, lung_checkpoint=tmp_path / "lung")
    assert caplog.messages == [f"{tmp_path / 'lung'} has seen {seen}, of this run's validation or test cases"]
    assert fitted
