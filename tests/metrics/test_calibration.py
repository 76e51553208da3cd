import numpy as np
import pytest

from resunet_jax.metrics.calibration import BINS, calibration_sums


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
