"""Sound scans are neither refused nor warned of; of others, what is accepted has its lungs where they are.

The scans are the phantom's, with what scanners and patients do to them: field of view, spacing, noise, raised arms,
implants, contrast agent, padding, clipping, file type.
"""

import functools
import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resunet_jax.config import PreprocessConfig
from resunet_jax.data import intensity
from resunet_jax.data.intensity import infer_scale, measure_levels
from resunet_jax.data.phantom import draw_scan
from resunet_jax.data.preprocess import air_offset
from resunet_jax.data.readers import open_scan
from resunet_jax.data.volume import HU_WINDOW, Grid, Volume
from resunet_jax.errors import InputError

AIR = PreprocessConfig(normalization="air")
TOLERANCE_HU = 130.0
"""How far the lungs of an accepted scan may lie from where they are, on the scale that the model sees.

Air may lie 100 HU off in a scan in Hounsfield units, and lung is at about 0.18 from air (0) to soft tissue (1), whose
distance may be 900 HU instead of 1045.
"""


class Sound(NamedTuple):
    """A scan as its file holds it, and what it is."""

    values: np.ndarray
    affine: np.ndarray
    scale: str
    what: str


def sound_scan(seed: int) -> Sound:
    """One of many sound scans; the same seed, the same scan."""
    rng = np.random.default_rng([2, seed])
    arms = rng.random() < 0.25
    field_mm = rng.uniform(440, 500) if arms else rng.uniform(250, 440)
    side, slices = int(rng.integers(72, 160)), int(rng.integers(6, 24))
    spacing = np.array([field_mm / side] * 2 + [rng.uniform(120, 300) / slices])
    hu, _, _ = draw_scan(rng, rng, (side, side, slices), spacing, nearly_free=bool(rng.random() < 0.3))
    y, x = ((np.arange(side) - (side - 1) / 2) * spacing[0],) * 2
    radius = np.hypot(x[None, :], y[:, None])
    what = [f"field {field_mm:.0f} mm"]
    if arms:
        what.append("arms")
        _draw_arms(hu, x[None, :], y[:, None], rng)
    if rng.random() < 0.3:
        what.append("contrast agent")
        vessel = np.hypot(x[None, :] - 15, y[:, None] + 25) < rng.uniform(20, 45)
        hu[vessel & (hu[..., slices // 2] > -200)] += rng.uniform(100, 350)
    if rng.random() < 0.2:
        what.append("implant")
        row, column = rng.integers(side // 4, 3 * side // 4, 2)
        hu[row : row + side // 24, column : column + side // 24, : slices // 2] = 3071
    noise = rng.uniform(0, 60)
    what.append(f"noise {noise:.0f} HU")
    hu = hu + rng.normal(0, noise, hu.shape)
    affine = np.diag([*spacing, 1.0])
    if rng.random() < 0.4:
        low, high = HU_WINDOW
        levels = np.rint((np.clip(hu, low, high) - low) / (high - low) * 255)
        if rng.random() < 0.4:
            what.append("padded")
            levels[radius > field_mm / 2] = 0
        return Sound(levels.astype(rng.choice([np.uint8, np.int16, np.float32])), affine, "windowed", ", ".join(what))
    if rng.random() < 0.6:
        hu = np.clip(hu, -1024, 3071)
    if rng.random() < 0.4:
        padding = int(rng.choice([-1024, -2000, -3024]))
        what.append(f"padded with {padding}")
        hu[radius > field_mm / 2] = padding
    values = hu.astype(np.float32) if rng.random() < 0.3 else np.rint(hu).astype(np.int16)
    return Sound(values, affine, "hu", ", ".join(what))


def _draw_arms(hu: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> None:
    """Raised beside the body: fat, muscle, and a bone."""
    centre, radius = rng.uniform(212, 230), rng.uniform(28, 42)
    for side in (-1, 1):
        distance = np.hypot(x - side * centre, y - rng.uniform(-30, 30))
        for outer, level in ((radius, -100), (0.85 * radius, 50), (0.25 * radius, 700)):
            inside = (distance < outer)[..., None] & (hu < (-500 if level == -100 else 3000))
            hu[inside] = level + rng.normal(0, 20, int(inside.sum()))


def check_sound(seed: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan = sound_scan(seed)
    path = folder / "scan.nii"
    image = nib.Nifti1Image(scan.values, scan.affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    caplog.clear()
    try:
        with open_scan(path) as opened:
            assert opened.intensity_scale == scan.scale
    except InputError as error:
        pytest.fail(f"seed {seed} ({scan.what}): {error}")
    assert not caplog.records, (seed, scan.what)


@pytest.mark.parametrize("seed", range(40))
def test_sound_scans_are_neither_refused_nor_warned_of(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    check_sound(seed, tmp_path, caplog)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(500))
def test_many_sound_scans_are_neither_refused_nor_warned_of(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    check_sound(1000 + seed, tmp_path, caplog)


class Chest(NamedTuple):
    """A phantom in Hounsfield units, what is healthy lung in it, and its levels."""

    hu: np.ndarray
    lung: np.ndarray
    levels: np.ndarray


@functools.cache
def chest(number: int) -> Chest:
    person, scan = np.random.default_rng([3, number]), np.random.default_rng([4, number])
    hu, lung, infection = draw_scan(person, scan, (96, 96, 12), np.array([4.3, 4.3, 20.0]), nearly_free=True)
    levels = measure_levels(Volume(hu, "hu", grid(hu)))
    return Chest(hu, (lung > 0) & (infection == 0), np.array([levels.air, levels.lung, levels.tissue]))


def grid(values: np.ndarray) -> Grid:
    return Grid(values.shape, np.diag([4.3, 4.3, 20.0, 1.0]))


def accepted(values: np.ndarray) -> Volume | None:
    """The scan as it is used, or None where it is refused by name."""
    levels = measure_levels(Volume(values, "hu", grid(values)))
    try:
        scale = infer_scale(Path("scan.nii"), levels, (float(values.min()), float(values.max())))
    except InputError as error:
        check_line(error)
        return None
    return Volume(values, scale, grid(values))


def check_line(error: InputError) -> None:
    assert str(error).startswith("scan.nii: ")
    assert "\n" not in str(error)


def check_lungs(volume: Volume, original: Chest) -> None:
    """The median of what is healthy lung lies where it is in Hounsfield units."""
    offset, slices = air_offset(volume, AIR), range(volume.values.shape[-1])
    low, high = HU_WINDOW
    seen = np.stack([volume.normalize_hu(k, offset) for k in slices], axis=-1)[original.lung]
    found = low + (high - low) * float(np.median(seen))
    assert abs(found - float(np.median(original.hu[original.lung]))) < TOLERANCE_HU


def how_far_inside(values: Any, *bounds: tuple[float, float]) -> float:
    """Distance of the value nearest to a bound, or beyond it (negative)."""
    return min(min(v - low, high - v) for v, (low, high) in zip(values, bounds, strict=True))


def slope_and_offset(number: int, slope: float, offset: float) -> None:
    original = chest(number)
    volume = accepted(np.rint(original.hu * slope + offset).astype(np.int16))
    air, _, tissue = original.levels * slope + offset
    inside = how_far_inside((air, tissue), intensity.AIR_HU, intensity.TISSUE_HU)
    if inside > 15:
        assert volume is not None
    if inside < -15:
        assert volume is None
    if volume is not None:
        assert volume.intensity_scale == "hu"
        check_lungs(volume, original)


def window(number: int, low: float, width: float) -> None:
    original = chest(number)
    values = np.rint((np.clip(original.hu, low, low + width) - low) / width * 255).astype(np.uint8)
    volume = accepted(values)
    air, _, tissue = (original.levels - low) / width * 255
    inside = how_far_inside(
        (air, tissue, tissue - air), intensity.AIR_LEVEL, intensity.TISSUE_LEVEL, intensity.TISSUE_ABOVE_AIR
    )
    at_the_end = 245 < tissue < 265  # how much of it is clipped depends on noise
    if inside > 5 and not at_the_end:
        assert volume is not None
    if inside < -5 and not at_the_end:
        assert volume is None
    if volume is not None:
        assert volume.intensity_scale == "windowed"
        check_lungs(volume, original)


NUMBERS = st.integers(0, 5)
PERTURBED = {
    slope_and_offset: (NUMBERS, st.floats(0.3, 1.6), st.floats(-600, 1100)),
    window: (NUMBERS, st.floats(-1700, -500), st.floats(300, 4500)),
}
EACH = pytest.mark.parametrize("function", PERTURBED, ids=lambda function: function.__name__)


@EACH
def test_what_is_accepted_has_its_lungs_where_they_are(function: Any) -> None:
    settings.get_profile("seeded")(given(*PERTURBED[function])(function))()


@pytest.mark.exhaustive
@EACH
def test_what_is_accepted_has_its_lungs_where_they_are_searched_long(function: Any) -> None:
    settings.get_profile("exhaustive")(given(*PERTURBED[function])(function))()


def test_every_bound_is_met_from_both_sides() -> None:
    """A grid near the bounds, where random values seldom are."""
    for slope, offset in itertools.product((0.9, 0.95, 1.0, 1.05, 1.1, 1.15), range(-200, 201, 20)):
        slope_and_offset(0, slope, offset)
    for low, width in itertools.product(range(-1500, -900, 50), range(1100, 2100, 100)):
        window(0, low, width)
