"""What the values of a scan mean; every refused kind is one that gave a wrong mask without a word."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.data.intensity import MUSCLE_HU, infer_scale, measure_levels, parse_assumption, rescaled_window
from resunet_jax.data.volume import HU_WINDOW, Grid, Volume
from resunet_jax.errors import InputError

PATH = Path("scan.nii.gz")
SIDE = 96


def chest(seed: int = 0, noise: float = 25.0, slices: int = 8) -> np.ndarray:
    """HU (96, 96, slices): air, a table, a body of fat and muscle with ribs, two lungs with vessels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    width, height = rng.uniform(36, 43), rng.uniform(24, 32)
    hu = np.full((SIDE, SIDE), -1000.0)
    hu[np.abs(y - height - 6) < 1.5] = rng.uniform(-300, -100)  # the table
    radius = np.hypot(x / width, y / height)
    hu[radius < 1] = -100
    hu[radius < rng.uniform(0.82, 0.93)] = rng.uniform(30, 70)
    hu[(np.abs(radius - 0.78) < 0.02) & (np.sin(9 * np.arctan2(y, x)) > 0.3)] = 500  # ribs
    for side in (-1, 1):
        lung = np.hypot((x - side * 0.42 * width) / (0.3 * width), y / (0.6 * height)) < 1
        hu[lung] = rng.uniform(-880, -780)
        hu[lung & (rng.random(lung.shape) < 0.04)] = 30  # vessels
    return hu[..., None] + rng.normal(0, noise, (SIDE, SIDE, slices))


def infer(values: np.ndarray, **kwargs) -> str:
    levels = measure_levels(Volume(values, "hu", Grid(values.shape, np.eye(4))))
    return infer_scale(PATH, levels, (float(values.min()), float(values.max())), **kwargs)


def exported(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint((np.clip(hu, low, high) - low) / (high - low) * 255).astype(np.uint8)


def beyond_the_field(values: np.ndarray, padding: float) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.where((np.hypot(x, y) > SIDE / 2)[..., None], padding, values)


@pytest.mark.parametrize("seed", range(40))
def test_sound_scans_are_taken(seed: int) -> None:
    """Noise, clipping at -1024, padding, contrast agent, metal, a cropped field of view, windows of two scanners."""
    rng = np.random.default_rng([1, seed])
    hu = chest(seed, noise=rng.uniform(5, 90))
    if seed % 2:
        hu = np.clip(hu, -1024, 3071)
    if seed % 3 == 0:
        hu = beyond_the_field(hu, rng.choice([-2000, -3024, -1024]))
    if seed % 5 == 0:
        hu[40:44, 46:50] = 3000  # metal
    if seed % 7 == 0:
        hu[44:52, 44:52] += 250  # contrast agent
    cropped = hu[24:72, 18:78] if seed % 4 == 0 else hu
    assert infer(np.rint(cropped).astype(np.int16)) == "hu"
    assert infer(exported(chest(seed), -1250, 250)) == "windowed"
    assert infer(beyond_the_field(exported(chest(seed), -1350, 150), 0)) == "windowed"


REFUSED = {
    "stored values without intercept, and padding": (lambda hu: beyond_the_field(hu + 1024, -2000), "Hounsfield"),
    "stored values without intercept": (lambda hu: np.clip(hu + 1024, 0, 4095), "neither Hounsfield"),
    "intercept applied twice": (lambda hu: hu - 1024, "Hounsfield"),
    "a soft-tissue window": (lambda hu: np.clip(hu, -200, 250), "Hounsfield"),
    "half the slope": (lambda hu: hu / 2, "Hounsfield"),
    "[-160, 240] in 0..255": (lambda hu: exported(hu, -160, 240), "0..255"),
    "[-1000, 1000] in 0..255": (lambda hu: exported(hu, -1000, 1000), "0..255"),
    "[-1024, 600] in 0..255": (lambda hu: exported(hu, -1024, 600), "0..255"),
    "[-1000, 500] in 0..255": (lambda hu: exported(hu, -1000, 500), "0..255"),
    "[-1024, 3071] in 0..255": (lambda hu: exported(hu, -1024, 3071), "0..255"),
    "[-900, 300] in 0..255": (lambda hu: exported(hu, -900, 300), "0..255"),
    "[-1400, -200] in 0..255": (lambda hu: exported(hu, -1400, -200), "0..255"),
    "a set in [0, 1.05]": (lambda hu: (np.clip(hu, -1250, 250) + 1250) / 1500 * 1.05, "0..255"),
    "a label map": (lambda hu: (hu > -500).astype(np.uint8) * 3, "label map"),
    "a PET volume": (
        lambda hu: np.maximum(hu + 1000, 0) / 300 * np.random.default_rng(0).random(hu.shape),
        "0..255",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_values_that_are_no_hounsfield_units_are_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    for seed in range(3):
        with pytest.raises(InputError, match=message) as refused:
            infer(make(chest(seed)))
        assert str(PATH) in str(refused.value)


def test_levels_are_those_of_the_anatomy() -> None:
    levels = measure_levels(Volume(chest(), "hu", Grid((SIDE, SIDE, 8), np.eye(4))))
    assert levels.air == pytest.approx(-1000, abs=15)
    assert -900 < levels.lung < -750
    assert 20 < levels.tissue < 80


def test_air_at_0_is_not_taken_for_the_next_commonest_level() -> None:
    """A clean background: the table and clothes are all that lies around the body above 0."""
    values = exported(chest(noise=3.0), -1000, 500)
    values[values < 8] = 0
    levels = measure_levels(Volume(values, "windowed", Grid(values.shape, np.eye(4))))
    assert levels.air == 0


def calibrated(values: np.ndarray, scale: str = "hu") -> tuple[float, float] | None:
    return rescaled_window(measure_levels(Volume(values, scale, Grid(values.shape, np.eye(4)))), scale)


def with_muscle_at(level: float, seed: int) -> np.ndarray:
    hu = chest(seed, noise=10.0)
    muscle = (hu > -30) & (hu < 150)
    return np.where(muscle, hu + level - np.median(hu[muscle]), hu)


@pytest.mark.parametrize("seed", range(10))
def test_sound_scans_are_not_rescaled(seed: int) -> None:
    for level in (20, MUSCLE_HU, 110):  # with contrast agent
        hu = with_muscle_at(level, seed)
        assert calibrated(hu) is None
        assert calibrated(np.clip(hu, -1024, 3071)) is None
    assert calibrated(exported(with_muscle_at(MUSCLE_HU, seed), -1250, 250), "windowed") is None


@pytest.mark.parametrize(("slope", "offset"), [(1.06, 0), (1.06, 63), (0.95, -50), (1, 40), (0.92, -100), (1.15, 90)])
def test_a_slope_and_offset_that_are_off_are_taken_back(slope: float, offset: float) -> None:
    expected = [slope * hu + offset for hu in HU_WINDOW]
    for seed in range(5):
        found = calibrated(slope * with_muscle_at(MUSCLE_HU, seed) + offset)
        np.testing.assert_allclose(found, expected, atol=15)


@pytest.mark.parametrize("slope", [0.95, 1.05])
def test_fat_tells_a_slope_that_is_off_from_contrast_agent(slope: float) -> None:
    """Muscle does not: it lies where it may lie with more or less contrast agent."""
    values = (with_muscle_at(65, seed=1) + 1000) * slope - 1000
    levels = measure_levels(Volume(values, "hu", Grid(values.shape, np.eye(4))))
    assert levels.landmarks.fat == pytest.approx(900 * slope - 1000, abs=10)
    assert rescaled_window(levels, "hu") is not None
    assert rescaled_window(levels._replace(landmarks=levels.landmarks._replace(fat=None)), "hu") is None


def test_a_slices_own_range_takes_any_scale_that_shows_lungs() -> None:
    hu = chest()
    for values in (hu + 1024, hu - 1024, exported(hu, -1024, 3071), exported(hu, -1000, 1000)):
        assert infer(values, physical=False) in ("hu", "windowed")
    with pytest.raises(InputError, match="no lungs"):
        infer(np.clip(hu, -200, 250), physical=False)


@pytest.mark.parametrize(
    ("text", "expected"), [("hu", HU_WINDOW), ("window:-1250,250", (0, 255)), ("window:-1000,500", (-42.5, 212.5))]
)
def test_an_assumption_says_where_the_window_lies(text: str, expected) -> None:
    assert parse_assumption(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["HU", "window", "window:1", "window:250,-1250", "window:nan,1", "window:1,2,3", ""])
def test_other_assumptions_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="it must be hu, or window:LOW,HIGH"):
        parse_assumption(text)


def test_assumed_values_are_the_hounsfield_units_that_they_stand_for() -> None:
    hu = chest(noise=0.0)
    volume = Volume(hu, "hu", Grid(hu.shape, np.eye(4)))
    values = exported(hu, -1000, 500)
    assumed = dataclasses.replace(volume, values=values, stored_window=parse_assumption("window:-1000,500"))
    inside = (hu[..., 0] > -1000) & (hu[..., 0] < 250)
    np.testing.assert_allclose(assumed.normalize_hu(0)[inside], volume.normalize_hu(0)[inside], atol=1 / 255)
