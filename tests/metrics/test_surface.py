import math
import warnings

import numpy as np
import pytest
import surface_distance
from scipy import ndimage

from resunet_jax.metrics.surface import surface_metrics


def cube(start: int, stop: int, shift: int = 0) -> np.ndarray:
    mask = np.zeros((20, 20, 20), bool)
    mask[start + shift : stop + shift, start:stop, start:stop] = True
    return mask


def test_equal_masks() -> None:
    assert surface_metrics(cube(5, 12), cube(5, 12), (1, 1, 1), 1) == {"nsd": 1, "hd95_mm": 0}


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.7, 0.7, 6.0), (2.5, 1.0, 0.5)])
def test_two_voxels_apart_by_a_known_distance(spacing_mm: tuple[float, float, float]) -> None:
    """Single voxels have congruent surfaces, so every point lies just the shift away, by the spacing of its axis."""
    for axis in range(3):
        a, b = np.zeros((2, 9, 9, 9), bool)
        a[4, 4, 4] = True
        place = [4, 4, 4]
        place[axis] += 1
        b[tuple(place)] = True
        # Of eight corners, four are shared; the 95th percentile is one of the others.
        values = surface_metrics(a, b, spacing_mm, 0.5 * spacing_mm[axis])
        assert values["hd95_mm"] == pytest.approx(spacing_mm[axis])
        assert 0 < values["nsd"] < 1
        assert surface_metrics(a, b, spacing_mm, spacing_mm[axis])["nsd"] == 1


def test_shifted_cube() -> None:
    """A cube shifted by 3 along one axis: two faces are 3 mm away, the others are not where they overlap."""
    values = surface_metrics(cube(4, 12), cube(4, 12, shift=3), (1, 1, 1), 2.9)
    assert values["hd95_mm"] == 3
    assert 0.4 < values["nsd"] < 1
    assert surface_metrics(cube(4, 12), cube(4, 12, shift=3), (1, 1, 1), 3)["nsd"] == 1


@pytest.mark.parametrize(("spacing", "slices"), [(0.2, 5), (0.1, 10), (0.6, 5), (float(np.float32(0.6)), 5)])
def test_what_lies_at_the_tolerance_is_within_it(spacing: float, slices: int) -> None:
    one, other = cube(4, 40), cube(4, 40, shift=slices)
    assert surface_metrics(one, other, (spacing, 0.7, 0.7), round(spacing * slices, 3))["nsd"] == 1


def test_spacing_is_in_mm() -> None:
    values = surface_metrics(cube(4, 12), cube(4, 12, shift=2), (3, 1, 1), 1)
    assert values["hd95_mm"] == 6


def test_agrees_with_all_pairs_of_surface_points(rng: np.random.Generator) -> None:
    """Hausdorff distance against a naive loop over the corners that touch both inside and outside."""
    a, b = (np.pad(rng.random((4, 4, 4)) > 0.5, 2) for _ in range(2))
    spacing = np.array([1.0, 2.0, 0.5])

    def corners(mask: np.ndarray) -> np.ndarray:
        size = mask.shape[0]
        found = [
            (i, j, k)
            for i in range(1, size)
            for j in range(1, size)
            for k in range(1, size)
            if 0 < mask[i - 1 : i + 1, j - 1 : j + 1, k - 1 : k + 1].sum() < 8
        ]
        return np.array(found) * spacing

    apart = np.linalg.norm(corners(a)[:, None] - corners(b)[None], axis=-1)
    farthest = max(apart.min(axis=0).max(), apart.min(axis=1).max())
    values = surface_metrics(a, b, tuple(spacing), farthest)
    assert values["nsd"] == 1
    assert values["hd95_mm"] <= farthest
    if farthest:
        assert surface_metrics(a, b, tuple(spacing), 0.99 * farthest)["nsd"] < 1


def test_agrees_with_the_package_of_its_authors(rng: np.random.Generator) -> None:
    """Elements weigh by their areas, of which those across thick slices are several times larger than others."""
    a, b = (np.pad(ndimage.gaussian_filter(rng.normal(size=(24, 20, 9)), (2, 2, 1)) > 0.02, 2) for _ in range(2))
    spacing = (0.7, 0.9, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = surface_distance.compute_surface_distances(b, a, spacing)
    values = surface_metrics(a, b, spacing, 1.1)
    assert values["nsd"] == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(distances, 1.1))
    assert values["hd95_mm"] == pytest.approx(surface_distance.compute_robust_hausdorff(distances, 95))


def test_empty_masks_have_a_stated_answer() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    values = surface_metrics(empty, empty, (1, 1, 1), 1)
    assert math.isnan(values["nsd"])
    assert math.isnan(values["hd95_mm"])
    for predicted, reference in ((empty, full), (full, empty)):
        values = surface_metrics(predicted, reference, (1, 1, 1), 1)
        assert values["nsd"] == 0
        assert math.isnan(values["hd95_mm"])


def test_does_not_depend_on_what_lies_around() -> None:
    a, b = cube(5, 12), cube(6, 13)
    cropped = tuple(slice(5, 13) for _ in range(3))
    assert surface_metrics(a, b, (1, 2, 3), 1) == surface_metrics(a[cropped], b[cropped], (1, 2, 3), 1)
