import math

import numpy as np
import pytest
from scipy import ndimage

from resunet_jax.metrics.severity import component_sizes, grade, involvement_percent, thirds


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(0, 0), (1e-9, 1), (4.99, 1), (5, 2), (24.9, 2), (25, 3), (49.9, 3), (50, 4), (74.9, 4), (75, 5), (100, 5)],
)
def test_grade_by_the_bands_of_the_score(percent: float, expected: int) -> None:
    assert grade(percent) == expected


def test_involvement_without_lung_is_undefined() -> None:
    assert involvement_percent(1, 4) == 25
    assert math.isnan(involvement_percent(0, 0))
    assert grade(math.nan) is None


def test_thirds_are_by_height_between_the_first_and_the_last_slice_with_lung() -> None:
    assert thirds(np.array([0, 0, 5, 1, 0, 1, 1, 7, 0])) == {"upper": (6, 8), "middle": (4, 6), "lower": (2, 4)}
    assert thirds(np.ones(5, np.int64)) == {"upper": (3, 5), "middle": (2, 3), "lower": (0, 2)}  # by rounding
    assert set(thirds(np.zeros(4, np.int64)).values()) == {(0, 0)}


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_component_sizes_are_those_of_the_whole_mask(rng: np.random.Generator, density: float) -> None:
    mask = rng.random((12, 15, 9)) < density
    mask[..., 4] = False  # nothing connects across it
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    expected = np.sort(np.bincount(labels.ravel())[1:])[::-1]
    np.testing.assert_array_equal(component_sizes(mask[..., k] for k in range(9)), expected)
