"""The suites on small work: that both sides do the same, and that every figure comes out."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import data, evaluation, fit, memory, prediction, training
from benchmarks.measure import load_torch_baseline
from benchmarks.training import config_of

from resunet_jax import Predictor, load_model
from resunet_jax.config import AugmentConfig, Config, PreprocessConfig, override
from resunet_jax.data.batches import SliceSource
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import prepare_volume
from resunet_jax.data.readers import read_volume
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.training import loop as training_loop
from tests.conftest import ROOT, Trained, with_averaging

TINY = (4, 8, 16, 32)


def test_opening_each_slice_gives_the_slices_of_the_cache(phantom: Path, tmp_path: Path) -> None:
    case = find_cases(phantom)[-1]
    (prepared,) = prepare_cases([case], PreprocessConfig(normalization="window"), tmp_path)
    for k in (0, 4, 8):
        opened = data.open_slice(case, k)
        np.testing.assert_array_equal(opened["image"][0], prepared.images[k])
        np.testing.assert_array_equal(opened["lung"][0], prepared.lung[k])
        np.testing.assert_array_equal(opened["infection"][0], prepared.infection[k])


def test_torch_baseline_segments_the_same_and_everywhere(trained: Trained) -> None:
    baseline = load_torch_baseline()
    if baseline is None:
        pytest.skip("PyTorch is not installed: pip install '.[torch]'")
    lung, infection = load_model(trained.lung), with_averaging(load_model(trained.infection))
    images, _ = prepare_volume(read_volume(find_cases(trained.data)[0].ct), infection.config.preprocess)
    by_jax = Predictor(lung, infection, thresholds={"lung": 0.0}).slice_probabilities(images)
    by_torch = baseline.TorchPredictor(lung, infection).slice_probabilities(images)
    for name, probability in by_jax.items():
        np.testing.assert_allclose(by_torch[name], probability, atol=1e-5)


@pytest.mark.exhaustive
def test_infection_training_of_the_torch_baseline_has_the_same_losses(trained: Trained, tmp_path: Path) -> None:
    baseline = load_torch_baseline()
    if baseline is None:
        pytest.skip("PyTorch is not installed: pip install '.[torch]'")
    config, lung = fit.make_models(TINY, epochs=1, image_size=32)
    config = override(config, {"train.learning_rate": 1e-9})  # the steps of the two schedules are counted otherwise
    cases = [case for case in find_cases(trained.data) if case.infection_mask]
    source = SliceSource(prepare_cases(cases, config.preprocess, tmp_path / "cache"), "infection")
    trainer = baseline.InfectionTrainer(config, lung, source)
    by_torch: list[float] = []
    history = training_loop.fit(
        config, source, None, tmp_path / "run", lung, on_epoch=lambda record: by_torch.append(np.mean(trainer.epoch()))
    )
    np.testing.assert_allclose(by_torch, [record["train_loss"] for record in history], rtol=1e-4)


def without_augmentation(setting: training.Setting) -> Config:
    """What compiles fastest."""
    return dataclasses.replace(config_of(setting), augment=AugmentConfig(transforms=()))


@pytest.mark.exhaustive
def test_training_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "settings", lambda: [training.Setting(TINY, 16, "float32")])
    monkeypatch.setattr(training, "config_of", without_augmentation)
    monkeypatch.setattr(training, "_MATRIX_SIZE", 64)
    product, step, by_xla = training.train_suite(1)
    assert (step.suite, step.name) == ("train", "4-8-16-32, 16², batch 8, float32")
    for figure in (step, product):
        assert figure.jax > 0
        assert (figure.ratio is not None) == (load_torch_baseline() is not None)
    assert product.unit == "GFLOP/s"
    assert by_xla.baseline > 0


def test_flops_of_a_step_match_the_count_by_hand() -> None:
    """Three times the convolutions' forward pass, which at full width is 278 GFLOP."""
    assert training.step_flops(training.Setting(training.FULL, 128, "float32")) == pytest.approx(834e9, rel=0.02)


def test_predicted_scan_has_lung_in_the_expected_fraction_of_slices() -> None:
    with prediction.phantom_scan(8) as scan:
        shortened = prediction._with_slices(scan, 4)
        assert read_volume(shortened).values.shape == (512, 512, 4)
        np.testing.assert_array_equal(read_volume(shortened).values, read_volume(scan).values[..., ::2])
        predictor = prediction._make_predictor(scan, TINY)
        images, _ = prepare_volume(read_volume(scan), predictor.preprocess)
    lung = predictor.slice_probabilities(images)["lung"] > predictor.threshold("lung")
    assert abs(lung.any(axis=(1, 2)).mean() - prediction.LUNG_FRACTION) < 0.15


@pytest.mark.exhaustive
def test_memory_is_what_the_compiler_plans() -> None:
    config = without_augmentation(training.Setting(TINY, 16, "float32"))
    small, large = (memory._temporary_gb(memory._with(config, batch_size=n)) for n in (8, 64))
    assert 4 < large / small < 9


def test_real_steps_are_at_least_three() -> None:
    config = without_augmentation(training.Setting(TINY, 16, "float32"))
    assert len(memory._real_steps(config, 1)) == 3


_TINY_SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
import benchmark
from benchmarks import training
from common.run import run
benchmark.SUITES = ("forward",)
training.settings = lambda: [training.Setting({TINY}, 16, "float32")]
training._MATRIX_SIZE = 64
run(benchmark.main)
"""


def test_script_writes_one_record_per_figure(tmp_path: Path) -> None:
    """Of all suites, each in a process of its own, and of the matrix product after them."""
    script, figures = tmp_path / "tiny.py", tmp_path / "figures.json"
    script.write_text(_TINY_SCRIPT)
    result = subprocess.run(
        [sys.executable, script, "--suite=all", "--rounds=1", f"--json={figures}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    record, product = json.loads(figures.read_text(encoding="utf-8"))
    assert "matrix product, after all suites" in product["name"]
    of_0_6_0 = {"suite", "name", "unit", "ours", "rival", "ratio", "target", "met", "spread"}
    assert set(record) == of_0_6_0 | {"jax", "baseline", "passed"}
    assert (record["suite"], record["name"]) == ("forward", "4-8-16-32, 16², batch 8, float32")
    assert record["jax"] > 0
    assert (record["ratio"] is not None) == (load_torch_baseline() is not None)
    assert "ratio ≤ 0.8" in result.stdout


def test_evaluation_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SHAPE", (64, 64, 40))
    seconds, peak = evaluation.evaluation_suite(1)
    assert (seconds.suite, seconds.unit, peak.unit) == ("evaluate", "s", "GB")
    assert 0 < seconds.jax < 15
    assert 0 < peak.jax < 1
