import numpy as np
import pytest

from resunet_jax.inference.regions import large_regions


def scan(size: int = 16) -> np.ndarray:
    """Two lungs of 4 × 4 × 3 and 2 × 4 × 3 pixels, and a speck of 2 in another slice; all larger in a larger one."""
    unit = size // 16
    mask = np.zeros((6, size, size), bool)
    mask[1:4, 2 * unit : 6 * unit, 2 * unit : 6 * unit] = True
    mask[1:4, 2 * unit : 4 * unit, 9 * unit : 13 * unit] = True
    mask[5, 10 * unit : 11 * unit, 10 * unit : 12 * unit] = True
    return mask


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize(("smallest", "regions"), [(0.0, 3), (0.04, 3), (0.1, 2), (0.5, 2), (0.51, 1), (1.0, 1)])
def test_regions_stay_by_their_part_of_the_largest(size: int, smallest: float, regions: int) -> None:
    mask = scan(size)
    expected = mask.copy()
    if regions < 3:
        expected[5] = False
    if regions < 2:
        expected[:, :, size // 2 :] = False
    np.testing.assert_array_equal(large_regions(mask, smallest), expected)


def test_slices_connect_and_corners_do_not() -> None:
    mask = np.zeros((4, 8, 8), bool)
    mask[:3, 2, 2] = True  # through three slices
    mask[0, 3, 3] = True  # touches at a corner
    kept = large_regions(mask, 0.5)
    assert kept[:3, 2, 2].all()
    assert not kept[0, 3, 3]


def test_pixels_that_a_block_joins_stay_as_they_are() -> None:
    """Of a size that blocks of three, which would be the largest, do not divide."""
    mask = np.zeros((1, 392, 392), bool)
    mask[0, 10:200:2, 10:200] = True  # stripes a pixel apart
    np.testing.assert_array_equal(large_regions(mask, 0.5), mask)


def test_empty_masks_stay_empty() -> None:
    assert not large_regions(np.zeros((2, 8, 8), bool), 0.1).any()
