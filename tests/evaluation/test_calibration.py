import numpy as np
import pytest

from resunet_jax.evaluation.calibration import BINS, calibrate


def test_closed_form() -> None:
    """Four pixels of probability 0.9, of which three are right; one of 0.1 that is not in the structure."""
    calibration = calibrate(np.float32([0.9, 0.9, 0.9, 0.9, 0.1]), np.uint8([1, 1, 1, 0, 0]))
    assert calibration.brier == pytest.approx((3 * 0.01 + 0.81 + 0.01) / 5)
    assert calibration.expected_error == pytest.approx(4 / 5 * 0.15 + 1 / 5 * 0.1)
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
    whole = calibrate(p, t)
    assert whole.expected_error == pytest.approx(error)
    assert whole.brier == pytest.approx(np.mean((p.astype(float) - t) ** 2))
    parts = calibrate(p[0], t[0]) + calibrate(p[1], t[1])
    assert parts.expected_error == pytest.approx(whole.expected_error)
    assert parts.brier == pytest.approx(whole.brier)


def test_perfect_and_calibrated() -> None:
    t = np.uint8([0, 1, 1, 0])
    perfect = calibrate(t.astype(np.float32), t)
    assert (perfect.brier, perfect.expected_error) == (0, 0)
    rng = np.random.default_rng(0)
    p = rng.random(200_000).astype(np.float32)
    assert calibrate(p, (rng.random(p.size) < p).astype(np.uint8)).expected_error < 0.01
