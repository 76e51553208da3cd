"""Scans whose slope, offset or window is a little off: the same masks, or refused or warned of by name."""

import functools
import logging
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.data.phantom import draw_scan
from resunet_jax.data.readers import judge_scan
from resunet_jax.data.volume import scan_from_array
from resunet_jax.errors import InputError
from resunet_jax.inference.predictor import Predictor, load_pretrained
from resunet_jax.inference.scan import segment_opened

PATH = Path("scan.nii")
SHAPE, SPACING_MM = (128, 128, 16), np.array([2.8, 2.8, 16.0])
NAMES = ("lung", "infection")
LEAST_DICE = 0.9


@functools.cache
def predictor() -> Predictor:
    return load_pretrained()


@functools.cache
def phantom(number: int) -> np.ndarray:
    """In Hounsfield units."""
    person, scan = np.random.default_rng([5, number]), np.random.default_rng([6, number])
    return draw_scan(person, scan, SHAPE, SPACING_MM, nearly_free=False)[0]


def masks(values: np.ndarray) -> list[np.ndarray]:
    scan = judge_scan(scan_from_array(values, np.diag([*SPACING_MM, 1.0])), PATH)
    found = segment_opened(scan, predictor(), PATH.name)
    return [found.mask(name, 0, SHAPE[2]) for name in NAMES]


@functools.cache
def unperturbed(number: int) -> list[np.ndarray]:
    return masks(np.rint(phantom(number)).astype(np.int16))


def perturbed(seed: int) -> tuple[int, np.ndarray, str]:
    """The number of a phantom, what a file holds of it, and what that is."""
    rng = np.random.default_rng([7, seed])
    number = int(rng.integers(3))
    if rng.random() < 0.5:
        slope, offset = rng.uniform(0.85, 1.15), rng.uniform(-150, 150)
        return number, np.rint(phantom(number) * slope + offset).astype(np.int16), f"× {slope:.3f} {offset:+.0f}"
    low, width = rng.uniform(-1450, -1050), rng.uniform(1200, 1900)
    levels = (np.clip(phantom(number), low, low + width) - low) / width * 255
    return number, np.rint(levels).astype(np.uint8), f"window from {low:.0f}, {width:.0f} wide"


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second))


def check(seed: int, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the scan was taken without a warning; then its masks are those of the unperturbed one."""
    number, values, what = perturbed(seed)
    expected = unperturbed(number)
    caplog.clear()
    try:
        found = masks(values)
        said = [record.message for record in caplog.records]
    except InputError as error:
        said = [str(error)]
    if said:
        assert all(text.startswith(f"{PATH}: ") for text in said)
        return False
    for name, mask, reference in zip(NAMES, found, expected, strict=True):
        assert dice(mask, reference) >= LEAST_DICE, (seed, number, what, name)
    return True


def test_masks_are_those_of_the_unperturbed_scan(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert all(mask.sum() > 500 for mask in unperturbed(0))
    assert 4 < sum(check(seed, caplog) for seed in range(10)) < 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(1000, 1500))
def test_masks_are_those_of_the_unperturbed_scan_searched_long(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    check(seed, caplog)
