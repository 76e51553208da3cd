"""Scans whose slope, offset or window is a little off: the same masks, or refused or warned of by name."""

import functools
import logging
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.data.phantom import draw_scan
from resunet_jax.data.readers import with_intensity_scale
from resunet_jax.data.volume import scan_from_array
from resunet_jax.errors import InputError
from resunet_jax.inference.predictor import Predictor, load_pretrained
from resunet_jax.inference.scan import segment_opened

PATH = Path("scan.nii")
SHAPE, SPACING_MM = (128, 128, 16), np.array([2.8, 2.8, 16.0])
NAMES = ("lung", "infection")
LEAST_DICE = 0.9


pytestmark = pytest.mark.usefixtures("optimized")


@functools.cache
def predictor() -> Predictor:
    return load_pretrained()


@functools.cache
def phantom(number: int) -> np.ndarray:
    """In Hounsfield units."""
    person, scan = np.random.default_rng([5, number]), np.random.default_rng([6, number])
    return draw_scan(person, scan, SHAPE, SPACING_MM, nearly_free=False)[0]


def masks(values: np.ndarray) -> list[np.ndarray]:
    scan = with_intensity_scale(scan_from_array(values, np.diag([*SPACING_MM, 1.0])), PATH)
    found = segment_opened(scan, predictor(), PATH.name)
    return [found.mask(name, 0, SHAPE[2]) for name in NAMES]


@functools.cache
def unperturbed(number: int) -> list[np.ndarray]:
    return masks(np.rint(phantom(number)).astype(np.int16))


def perturbed(seed: int) -> tuple[int, np.ndarray]:
    """The number of a phantom, and what a file holds of it."""
    rng = np.random.default_rng([7, seed])
    number = int(rng.integers(3))
    if rng.random() < 0.5:
        slope, offset = rng.uniform(0.85, 1.15), rng.uniform(-150, 150)
        return number, np.rint(phantom(number) * slope + offset).astype(np.int16)
    low, width = rng.uniform(-1450, -1050), rng.uniform(1200, 1900)
    levels = (np.clip(phantom(number), low, low + width) - low) / width * 255
    return number, np.rint(levels).astype(np.uint8)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second))


def least_dice(seed: int, caplog: pytest.LogCaptureFixture) -> float | None:
    """Of lungs and infection with those of the unperturbed scan; None where the scan was refused or warned of."""
    number, values = perturbed(seed)
    expected = unperturbed(number)
    caplog.clear()
    try:
        found = masks(values)
        said = [record.message for record in caplog.records]
    except InputError as error:
        said = [str(error)]
    if said:
        assert all(text.startswith(f"{PATH}: ") for text in said)
        return None
    return min(dice(mask, reference) for mask, reference in zip(found, expected, strict=True))


def test_masks_are_those_of_the_unperturbed_scan(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert all(mask.sum() > 500 for mask in unperturbed(0))
    dices = [value for seed in range(10) if (value := least_dice(seed, caplog)) is not None]
    assert 4 < len(dices) < 10
    assert min(dices) >= LEAST_DICE


@pytest.mark.exhaustive
def test_masks_are_those_of_the_unperturbed_scan_searched_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    dices = [value for seed in range(1000, 1500) if (value := least_dice(seed, caplog)) is not None]
    assert len(dices) > 100
    assert min(dices) >= LEAST_DICE
