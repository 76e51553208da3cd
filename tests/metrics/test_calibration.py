import numpy as np
import pytest

from resunet_jax.metrics.calibration import (
    BINS,
    TEMPERATURES,
    apply_temperature,
    calibration_sums,
    fit_temperature,
    logit_histogram,
)


def test_closed_form() -> None:
    """Four pixels of probability 0.9, of which three are right; one of 0.1 that is not in the structure."""
    calibration = calibration_sums(np.float32([0.9, 0.9, 0.9, 0.9, 0.1]), np.uint8([1, 1, 1, 0, 0]))
    assert calibration.brier == pytest.approx((3 * 0.01 + 0.81 + 0.01) / 5)
    assert calibration.ece == pytest.approx(4 / 5 * 0.15 + 1 / 5 * 0.1)
    bins = calibration.to_dict()["bins"]
    assert [(b["pixels"], b["frequency"]) for b in bins] == [(1, 0), (4, 0.75)]
    assert bins[1]["mean_probability"] == pytest.approx(0.9)


def test_against_a_naive_loop_and_adds_up(rng: np.random.Generator) -> None:
    p, t = rng.random((2, 4, 5)).astype(np.float32), (rng.random((2, 4, 5)) > 0.5).astype(np.uint8)
    p[0, 0, :2] = 0, 1
    error = 0.0
    for i in range(BINS):
        last = i == BINS - 1
        inside = [
            (float(a), float(b))
            for a, b in zip(p.ravel(), t.ravel(), strict=True)
            if i <= float(a) * BINS and (float(a) * BINS < i + 1 or last)
        ]
        error += abs(sum(b - a for a, b in inside)) / p.size
    whole = calibration_sums(p, t)
    assert whole.ece == pytest.approx(error)
    assert whole.brier == pytest.approx(np.mean((p.astype(float) - t) ** 2))
    both = calibration_sums(p[0], t[0]) + calibration_sums(p[1], t[1])
    assert both.ece == pytest.approx(whole.ece)
    assert both.brier == pytest.approx(whole.brier)


def test_perfect_and_calibrated() -> None:
    t = np.uint8([0, 1, 1, 0])
    perfect = calibration_sums(t.astype(np.float32), t)
    assert (perfect.brier, perfect.ece) == (0, 0)
    rng = np.random.default_rng(0)
    p = rng.random(200_000).astype(np.float32)
    assert calibration_sums(p, (rng.random(p.size) < p).astype(np.uint8)).ece < 0.01


def drawn(temperature: float, pixels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of which the targets would be drawn if their logits were divided by the temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 4, pixels)
    target = rng.random(pixels) < 1 / (1 + np.exp(-logits / temperature))
    return (1 / (1 + np.exp(-logits))).astype(np.float32), target.astype(np.uint8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_targets_is_found(temperature: float) -> None:
    p, t = drawn(temperature, 200_000, 0)
    histogram = logit_histogram(p, t)
    found = fit_temperature([histogram])
    assert found == pytest.approx(temperature, rel=0.03)
    assert all(histogram.nll(found) <= histogram.nll(found * factor) for factor in (0.9, 1.1))
    assert histogram.calibration(found).ece < 0.01
    assert temperature == 1 or histogram.calibration().ece > 0.03


def test_a_histogram_knows_what_its_pixels_do() -> None:
    p, t = drawn(2.0, 20_000, 1)
    for temperature in (1.0, 2.0):
        expected = calibration_sums(apply_temperature(p, temperature), t)
        found = logit_histogram(p, t).calibration(temperature)
        assert found.brier == pytest.approx(expected.brier, abs=1e-3)
        assert found.ece == pytest.approx(expected.ece, abs=1e-3)
    parts = logit_histogram(p[:7000], t[:7000]) + logit_histogram(p[7000:], t[7000:])
    np.testing.assert_array_equal(parts.counts, logit_histogram(p, t).counts)
    scaled = apply_temperature(p, 2.0).astype(float)
    nll = -np.mean(np.where(t, np.log(scaled), np.log1p(-scaled)))
    assert parts.nll(2.0) == pytest.approx(nll, rel=1e-3)


def test_no_patient_decides_for_the_others_and_what_was_removed_does_not_count() -> None:
    patients = [logit_histogram(*drawn(t, n, k)) for k, (t, n) in enumerate([(1.2, 5_000), (2, 5_000), (7, 500_000)])]
    alone = [fit_temperature([one]) for one in patients]
    assert fit_temperature(patients) == alone[1]
    assert fit_temperature(patients[:2]) == pytest.approx((alone[0] + alone[1]) / 2)
    p, t = drawn(2.0, 1000, 4)
    with_removed = logit_histogram(np.append(p, np.zeros(500, np.float32)), np.append(t, np.ones(500, np.uint8)))
    np.testing.assert_array_equal(with_removed.counts, logit_histogram(p, t).counts)
    outside = logit_histogram(p, np.zeros_like(t))
    assert not outside.has_both
    assert fit_temperature([patients[0], outside]) == alone[0]
    with pytest.raises(ValueError, match="found none"):
        fit_temperature([outside])


@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_temperatures_far_from_1_are_found(temperature: float) -> None:
    p, t = drawn(temperature, 200_000, 5)
    assert fit_temperature([logit_histogram(p, t)]) == pytest.approx(temperature, rel=0.1)


def test_a_logit_counts_as_the_middle_of_its_bin() -> None:
    """Not as an end of it, which would move every probability the same way."""
    logits = np.linspace(-4, 4, 100_001)
    p = (1 / (1 + np.exp(-logits))).astype(np.float32)
    sums = logit_histogram(p, np.zeros(p.shape, np.uint8)).calibration()
    assert sums.probability.sum() / p.size == pytest.approx(0.5, abs=1e-5)


def test_certain_probabilities_are_bounded() -> None:
    p, t = np.float32([0, 1, 1, 1e-30]), np.uint8([0, 1, 0, 0])
    assert np.isfinite(logit_histogram(p, t).nll(1.0))
    assert TEMPERATURES[0] <= fit_temperature([logit_histogram(p, np.uint8([0, 1, 1, 0]))]) <= TEMPERATURES[1]
    np.testing.assert_array_equal(apply_temperature(np.float32([0, 0.5, 1]), 3.0), np.float32([0, 0.5, 1]))
    p = np.linspace(0, 1, 1001, dtype=np.float32)
    assert (np.diff(apply_temperature(p, 3.0)) > 0).all()
    np.testing.assert_allclose(apply_temperature(apply_temperature(p, 3.0), 1 / 3), p, atol=1e-5)
