"""The suites on small work: that both sides do the same, and that every figure comes out."""

import json
from pathlib import Path

import numpy as np
import pytest

from resunet_jax import Segmenter, load_model
from resunet_jax.benchmark import data, memory, prediction, training
from resunet_jax.benchmark.measure import load_rival
from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.prepared import prepare_cases, prepare_volume
from resunet_jax.data.volumes import read_volume
from tests.conftest import Trained, run_script

TINY = (4, 8, 16, 32)


def test_opening_each_slice_gives_the_slices_of_the_store(phantom: Path, tmp_path: Path) -> None:
    case = find_cases(phantom)[-1]
    (prepared,) = prepare_cases([case], PreprocessConfig(), tmp_path)
    for k in (0, 4, 8):
        opened = data.open_slice(case, k)
        np.testing.assert_array_equal(opened["image"][0], prepared.images[k])
        np.testing.assert_array_equal(opened["lung"][0], prepared.lung[k])
        np.testing.assert_array_equal(opened["infection"][0], prepared.infection[k])


def test_rival_segments_the_same_and_everywhere(trained: Trained) -> None:
    rival = load_rival()
    if rival is None:
        pytest.skip("PyTorch is not installed: pip install '.[torch]'")
    lung, infection = load_model(trained.lung), load_model(trained.infection)
    images, _ = prepare_volume(read_volume(find_cases(trained.data)[0].ct), lung.config.preprocess)
    ours = Segmenter(lung, infection, thresholds={"lung": 0.0}).probabilities(images)
    theirs = rival.TorchSegmenter(lung, infection).probabilities(images)
    for name, probability in ours.items():
        np.testing.assert_allclose(theirs[name], probability, atol=1e-5)


def test_training_and_forward_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "settings", lambda: [training.Setting(TINY, 16, "float32")])
    (step, product), (forward,) = training.train_suite(1), training.forward_suite(1)
    has_rival = load_rival() is not None
    for figure, suite in ((step, "train"), (forward, "forward")):
        assert (figure.suite, figure.name) == (suite, "4-8-16-32, 16², batch 8, float32")
        assert figure.ours > 0
        assert (figure.ratio is not None) == has_rival
    assert product.unit == "GFLOP/s"


def test_flops_of_a_step_are_those_of_the_paper_and_pencil() -> None:
    """Three times the convolutions' forward pass, which at full width is 278 GFLOP."""
    assert training.step_flops(training.Setting(training.FULL, 128, "float32")) == pytest.approx(834e9, rel=0.02)


def test_predicted_scan_has_the_wanted_part_with_lung() -> None:
    with prediction._scan(8) as scan:
        shortened = prediction._with_slices(scan, 4)
        assert read_volume(shortened).values.shape == (512, 512, 4)
        np.testing.assert_array_equal(read_volume(shortened).values, read_volume(scan).values[..., ::2])
        segmenter = prediction._make_segmenter(scan, TINY)
        images, _ = prepare_volume(read_volume(scan), segmenter.preprocess)
    lung = segmenter.probabilities(images)["lung"] > segmenter.threshold("lung")
    assert abs(lung.any(axis=(1, 2)).mean() - prediction.LUNG_PART) < 0.15


def test_memory_is_what_the_compiler_plans() -> None:
    config = training.config_of(training.Setting(TINY, 16, "float32"))
    small, large = (memory._temporary_gb(memory._with(config, batch_size=n)) for n in (8, 64))
    assert 4 < large / small < 9
    assert len(memory._real_steps(config, 1)) == 3


def test_script_writes_a_row_a_figure(tmp_path: Path) -> None:
    result = run_script("benchmark", "--suite=forward", "--rounds=1", f"--json={tmp_path / 'figures.json'}")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())
    wanted = {"suite", "name", "unit", "ours", "rival", "ratio", "target", "met", "spread"}
    assert [set(row) for row in rows] == [wanted] * 2
    assert "ratio ≤ 1.0" in result.stdout
    assert run_script("benchmark", "--suite=none").returncode != 0
