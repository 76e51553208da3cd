import numpy as np
import pytest
from scipy import ndimage

from resunet_jax.config import PostprocessConfig
from resunet_jax.data.volume import Grid
from resunet_jax.inference import postprocess as module
from resunet_jax.inference.postprocess import large_components, remove_small_components


def scan(size: int = 16) -> np.ndarray:
    """Lungs of 4 × 4 × 3 and 2 × 4 × 3 voxels, and a speck of 2 in another slice; scaled with the size."""
    unit = size // 16
    mask = np.zeros((6, size, size), bool)
    mask[1:4, 2 * unit : 6 * unit, 2 * unit : 6 * unit] = True
    mask[1:4, 2 * unit : 4 * unit, 9 * unit : 13 * unit] = True
    mask[5, 10 * unit : 11 * unit, 10 * unit : 12 * unit] = True
    return mask


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize(("min_fraction", "components"), [(0.0, 3), (0.04, 3), (0.1, 2), (0.5, 2), (0.51, 1), (1.0, 1)])
def test_components_stay_by_their_fraction_of_the_largest(size: int, min_fraction: float, components: int) -> None:
    mask = scan(size)
    expected = mask.copy()
    if components < 3:
        expected[5] = False
    if components < 2:
        expected[:, :, size // 2 :] = False
    np.testing.assert_array_equal(large_components(mask, min_fraction), expected)


def test_components_connect_across_slices_and_not_at_corners() -> None:
    mask = np.zeros((4, 8, 8), bool)
    mask[:3, 2, 2] = True  # through three slices
    mask[0, 3, 3] = True  # touches at a corner
    kept = large_components(mask, 0.5)
    assert kept[:3, 2, 2].all()
    assert not kept[0, 3, 3]


def test_pixels_of_a_kept_block_stay_unprocessed() -> None:
    """Of a size that blocks of three, which would be the largest, do not divide."""
    mask = np.zeros((1, 392, 392), bool)
    mask[0, 10:200:2, 10:200] = True  # stripes a pixel apart
    np.testing.assert_array_equal(large_components(mask, 0.5), mask)


def test_empty_masks_stay_empty() -> None:
    assert not large_components(np.zeros((2, 8, 8), bool), 0.1).any()
    probabilities = {"lung": np.zeros((2, 8, 8), np.float32), "infection": np.ones((2, 8, 8), np.float32)}
    remove_small_components(probabilities, 0.5, 0.1)
    assert not probabilities["infection"].any()


def probabilities_of(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Lung 0.7 in the mask and 0.3 elsewhere, infection 0.9 everywhere."""
    return {"lung": np.where(mask, 0.7, 0.3).astype(np.float32), "infection": np.full(mask.shape, 0.9, np.float32)}


def test_a_removed_component_is_zero_and_a_slice_without_lung_has_no_infection() -> None:
    mask = scan()
    found, before = probabilities_of(mask), probabilities_of(mask)
    remove_small_components(found, 0.5, 0.1)
    assert not found["lung"][5][mask[5]].any()
    elsewhere = np.ones_like(mask)
    elsewhere[5] = ~mask[5]
    np.testing.assert_array_equal(found["lung"][elsewhere], before["lung"][elsewhere])
    np.testing.assert_array_equal(found["infection"][1:4], before["infection"][1:4])
    assert not found["infection"][[0, 4, 5]].any()


def test_components_are_of_the_mask_at_the_lungs_threshold() -> None:
    """Below 0.3 everything is one component, above 0.7 nothing is lung."""
    mask = scan()
    low, high = probabilities_of(mask), probabilities_of(mask)
    remove_small_components(low, 0.2, 0.1)
    np.testing.assert_array_equal(low["lung"], probabilities_of(mask)["lung"])
    assert low["infection"].all()
    remove_small_components(high, 0.8, 0.1)
    np.testing.assert_array_equal(high["lung"], probabilities_of(mask)["lung"])
    assert not high["infection"].any()


def test_a_fraction_of_zero_removes_nothing() -> None:
    mask = scan()
    found = probabilities_of(mask)
    remove_small_components(found, 0.5, 0.0)
    for name, before in probabilities_of(mask).items():
        np.testing.assert_array_equal(found[name], before)


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radius: float) -> np.ndarray:
    distance = [(axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)]
    return np.sqrt(sum(distance)) <= radius


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.0), (1.0, 2.0, 2.0), (6.5, 1.0, 1.0)])
@pytest.mark.parametrize("empty", [slice(0), slice(0, 4), slice(8, 22), slice(3, None)])
def test_closing_is_dilation_then_erosion_by_a_ball(
    rng: np.random.Generator, spacing: tuple[float, ...], empty: slice
) -> None:
    mask = ndimage.gaussian_filter(rng.random((30, 24, 26)), 2) > 0.505
    mask[empty] = False
    radius, pad = 6.0, 8
    padded = np.pad(mask, pad)
    dilated = ndimage.distance_transform_edt(~padded, sampling=spacing) <= radius
    eroded = ndimage.distance_transform_edt(dilated, sampling=spacing) > radius
    closed = module.close_mask(mask, spacing, radius)
    np.testing.assert_array_equal(closed, eroded[(slice(pad, -pad),) * 3] | mask)
    assert closed.sum() > mask.sum()
    np.testing.assert_array_equal(module.close_mask(mask, spacing, 0.0), mask)
    np.testing.assert_array_equal(module.close_mask(np.zeros_like(mask), spacing, radius), np.zeros_like(mask))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 4.0, 6.0)])
def test_gate_keeps_infection_in_the_outline_of_a_lung_and_nothing_else(spacing: tuple[float, float, float]) -> None:
    """A hole in the lung and what the lung mask covers stay; the mediastinum between the lungs and the bowel go."""
    size, slices = 64, 40
    shape = (slices, size, size)
    lungs = ball(shape, (20, 32, 16), 13) | ball(shape, (20, 32, 48), 13)
    hole = ball(shape, (20, 32, 16), 3)
    infection = hole | ball(shape, (20, 32, 48), 2) | ball(shape, (20, 32, 32), 1) | ball(shape, (36, 50, 32), 3)
    probabilities = {"lung": (lungs & ~hole).astype(np.float32), "infection": infection.astype(np.float32)}
    boxes = np.tile(np.array([8, 16, size, size], np.int32), (slices, 1))
    grid = Grid((100, 100, slices), np.diag([*spacing, 1.0]) @ axes_of_pls())
    expected = infection & lungs
    module.gate_infection(probabilities, 0.5, boxes, grid, 4 * max(spacing))
    np.testing.assert_array_equal(probabilities["infection"] > 0, expected)
    module.gate_infection(probabilities, 0.5, boxes, grid, 0.0)
    assert not probabilities["infection"][ball(shape, (20, 32, 16), 1)].any()  # the hole, but for its border


def test_gate_closes_a_lone_lung_as_one() -> None:
    """The left one, away from the middle, narrow above what its mask leaves out and wide below."""
    size, slices = 64, 40
    lung = np.zeros((slices, size, size), np.float32)
    lung[5:20, 20:44, 40:] = 1
    lung[23:38, 20:44, 40:48] = 1
    infection = np.zeros_like(lung)
    infection[20:23, 26:38, 42:46] = 1
    boxes = np.tile(np.array([8, 16, size, size], np.int32), (slices, 1))
    probabilities = {"lung": lung, "infection": infection.copy()}
    module.gate_infection(probabilities, 0.5, boxes, Grid((100, 100, slices), axes_of_pls()), 4.0)
    np.testing.assert_array_equal(probabilities["infection"], infection)


def gated(
    lung: np.ndarray, infection: np.ndarray, spacing: tuple[float, float, float], closing_mm: float
) -> np.ndarray:
    """What stays of an infection, in slices whose box is the whole slice, with pixels as fine as the scan's."""
    slices, *size = lung.shape
    boxes = np.tile(np.array([0, 0, *size], np.int32), (slices, 1))
    grid = Grid((*size, slices), np.diag([*spacing, 1.0]) @ axes_of_pls())
    probabilities = {"lung": lung.astype(np.float32), "infection": infection.astype(np.float32)}
    module.gate_infection(probabilities, 0.5, boxes, grid, closing_mm)
    return probabilities["infection"] > 0


def test_gate_removes_infection_beside_a_straight_edge_of_the_lung() -> None:
    lung, infection = np.zeros((2, 12, 32, 32), bool)
    lung[2:10, 8:24, 18:28] = True
    infection[4:8, 1:4, 20:26] = infection[4:8, 27:30, 20:26] = True  # in front of it and behind it
    infection[4:8, 12:20, 30:] = infection[4:8, 12:20, 10:14] = True  # to either side
    assert not gated(lung, infection, (2.0, 2.0, 2.0), 4.0).any()


def test_gate_closes_by_the_spacing_of_each_axis() -> None:
    """A hole of one slice of 10 mm is wider than a ball of 4 mm closes, one of a pixel of 2 mm is not."""
    lung, infection = np.zeros((2, 12, 32, 32), bool)
    lung[2:10, 8:24, 18:30] = True
    lung[5] = lung[7, 15, 22] = False
    infection[5, 12:20, 20:26] = infection[7, 15, 22] = True
    stays = gated(lung, infection, (2.0, 2.0, 10.0), 4.0)
    assert not stays[5].any()
    assert stays[7, 15, 22]


def test_gate_has_the_lung_of_all_the_slices_that_it_joins() -> None:
    """Slices of 1 mm, two of which are one of the gate: lung in either is lung."""
    lung, infection = np.zeros((2, 12, 32, 32), bool)
    lung[4, 8:24, 18:30] = True
    lung[5, 8:10, 18:20] = True
    infection[5, 12:20, 20:26] = True
    np.testing.assert_array_equal(gated(lung, infection, (2.0, 2.0, 1.0), 0.0), infection)


@pytest.mark.parametrize(("radius_mm", "stays"), [(1.9, False), (2.0, True)])
def test_gate_is_closed_in_millimetres_on_pixels_of_any_size(radius_mm: float, stays: bool) -> None:
    """A hole of 4 mm, along columns of 0.5 mm, of which four are one of the gate, and rows of 2 mm."""
    lung, infection = np.zeros((2, 12, 64, 64), bool)
    lung[2:10, 20:44, 34:62] = True
    lung[4:8, 30:34, 44:52] = False
    infection[5, 30:34, 44:52] = True
    np.testing.assert_array_equal(gated(lung, infection, (0.5, 2.0, 2.0), radius_mm), infection & stays)


def test_gate_lies_in_the_box_of_its_slice_along_both_axes() -> None:
    """In a box of 32 rows and 64 columns: a hole of one slice in the lung stays, what lies beside the lung does not."""
    slices, size = 12, 32
    lung, infection = np.zeros((2, slices, size, size), np.float32)
    lung[2:10, 8:24, 18:30] = 1
    lung[5, 12:20, 22:28] = 0
    infection[5, 4:28, 14:32] = 1
    boxes = np.tile(np.array([40, 10, 32, 64], np.int32), (slices, 1))
    grid = Grid((80, 100, slices), np.diag([2.0, 2.0, 2.0, 1.0]) @ axes_of_pls())
    probabilities = {"lung": lung, "infection": infection.copy()}
    module.gate_infection(probabilities, 0.5, boxes, grid, 2.0)
    np.testing.assert_array_equal(probabilities["infection"], infection * lung[4])


def test_gate_keeps_infection_in_lung_that_is_too_small_for_it() -> None:
    lung = np.zeros((40, 64, 64), np.float32)
    lung[11, 21, 21] = 1  # between the voxels of the gate
    boxes = np.tile(np.array([8, 16, 64, 64], np.int32), (40, 1))
    probabilities = {"lung": lung, "infection": lung.copy()}
    module.gate_infection(probabilities, 0.5, boxes, Grid((100, 100, 40), axes_of_pls()), 4.0)
    assert probabilities["infection"][11, 21, 21] == 1


def axes_of_pls() -> np.ndarray:
    """An affine whose axes are (posterior, left, superior)."""
    return np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize(
    ("min_ml", "min_probability", "keep_ml", "stays"),
    [
        (0.0, 0.0, 0.0, "abc"),
        (0.3, 0.0, 0.0, "ac"),
        (0.0, 0.9, 0.0, "bc"),
        (0.3, 0.9, 0.0, "c"),
        (1.0, 0.0, 0.0, "c"),
        (9.0, 0.0, 0.0, ""),
        (0.0, 0.99, 0.0, ""),
        (0.0, 0.99, 0.4, "ac"),
        (0.0, 0.99, 1.0, "c"),
        (9.0, 0.99, 1.0, ""),
    ],
)
def test_lesions_stay_by_volume_and_highest_probability(
    size: int, min_ml: float, min_probability: float, keep_ml: float, stays: str
) -> None:
    """a: 0.5 ml and unlikely; b: 0.125 ml and likely; c: 2 ml, likely in one voxel; two of them touch at no corner."""
    unit = size // 16
    infection = np.zeros((4, size, size), np.float32)
    lesions = {"a": (1, 1, 2), "b": (1, 6, 1), "c": (2, 10, 4)}  # slice, first row and column, side: ml by area
    for name, (k, first, side) in lesions.items():
        rows = slice(first * unit, (first + side) * unit)
        infection[k, rows, rows] = 0.95 if name == "b" else 0.6
    infection[2, 10 * unit, 10 * unit] = 0.97
    infection[infection == 0] = 0.4  # below the threshold, and of no lesion
    box = np.tile(np.array([0, 0, 32, 32], np.int32), (4, 1))
    # A pixel of 2 × 2 native ones at 16: 0.5 ml for side 2, 0.125 for side 1, 2 ml for side 4.
    grid = Grid((32, 32, 4), np.diag([2.5, 2.5, 5.0, 1.0]) @ axes_of_pls())
    before = infection.copy()
    config = PostprocessConfig(min_lesion_ml=min_ml, min_lesion_probability=min_probability, keep_lesion_ml=keep_ml)
    module.remove_low_confidence_lesions(infection, 0.5, box, grid, config)
    for name, (k, first, side) in lesions.items():
        rows = slice(first * unit, (first + side) * unit)
        assert (infection[k, rows, rows] > 0.5).any() == (name in stays), name
        if name in stays:
            np.testing.assert_array_equal(infection[k, rows, rows], before[k, rows, rows])
    np.testing.assert_array_equal(infection[before <= 0.5], before[before <= 0.5])


def test_volume_of_a_lesion_is_by_the_boxes_of_its_own_slices() -> None:
    infection = np.zeros((4, 16, 16), np.float32)
    infection[0, 2:4, 2:4] = infection[3, 9:11, 9:11] = 0.9  # 0.25 ml and 1 ml
    boxes = np.array([[0, 0, 32, 16]] * 2 + [[0, 0, 32, 64]] * 2, np.int32)
    grid = Grid((32, 64, 4), np.diag([2.5, 2.5, 5.0, 1.0]) @ axes_of_pls())
    config = PostprocessConfig(min_lesion_ml=0.4, min_lesion_probability=0.0)
    module.remove_low_confidence_lesions(infection, 0.5, boxes, grid, config)
    assert not infection[0].any()
    assert infection[3].any()


INFECTED = {"infected_scan_odds": 5.0, "infected_scan_lesion_probability": 0.55, "infected_scan_ml": 2.0}


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({}, "a"),
        ({"min_lesion_ml": 0.1}, "ab"),
        ({"infected_scan_lesion_probability": 0.46}, "ac"),
        ({"infected_scan_odds": 1.0}, ""),
        ({"infected_scan_odds": 9.0}, "ac"),
        ({"infected_scan_ml": 2.01}, ""),
        ({"infected_scan_ml": 0.0}, ""),
        ({"min_lesion_ml": 0.0, "infected_scan_lesion_probability": 0.0}, "abc"),
        ({"min_lesion_probability": 0.98}, ""),  # so no lesion is sure
    ],
)
def test_lesions_of_both_views_are_added_beside_enough_that_are_sure(size: int, changes: dict, added: str) -> None:
    """Beside 2 ml that reach 0.97, a: 0.5 ml that reach 0.3; b: 0.125 ml that do; c: 0.5 ml that reach 0.15.

    d, which reaches 0.3, overlaps the sure lesion.
    """
    unit = size // 16
    infection, geometric_mean = np.full((4, size, size), 0.01, np.float32), np.full((4, size, size), 0.02, np.float32)

    def square(first: int, side: int) -> tuple[slice, slice]:
        return (slice(first * unit, (first + side) * unit),) * 2

    lesions = {"a": (1, 1, 2, 0.3), "b": (1, 6, 1, 0.3), "c": (3, 1, 2, 0.15), "d": (2, 8, 3, 0.3)}
    infection[2][square(10, 4)] = 0.6
    infection[2, 10 * unit, 10 * unit] = 0.97
    for k, first, side, highest in lesions.values():
        geometric_mean[k][square(first, side)] = 0.1
        geometric_mean[k, first * unit, first * unit] = highest
    box = np.tile(np.array([0, 0, 32, 32], np.int32), (4, 1))
    grid = Grid((32, 32, 4), np.diag([2.5, 2.5, 5.0, 1.0]) @ axes_of_pls())
    fields = {**INFECTED, "min_lesion_ml": 0.4, "min_lesion_probability": 0.95, **changes}
    infection[1, unit, 3 * unit] = 0.2  # beside a, and more than the views say
    before, odds = infection.copy(), fields["infected_scan_odds"]
    raised = odds * geometric_mean / (1 - geometric_mean + odds * geometric_mean)
    is_added = module.add_lesions(infection, geometric_mean, 0.25, box, grid, PostprocessConfig(**fields))
    for name, (k, first, side, _) in lesions.items():
        expected = raised if name in added else before
        assert is_added[k][square(first, side)].all() == is_added[k][square(first, side)].any() == (name in added)
        np.testing.assert_allclose(infection[k][square(first, side)], expected[k][square(first, side)], rtol=1e-6)
        assert (name in added) == (infection[k][square(first, side)] > 0.25).any() or name == "d"
    np.testing.assert_array_equal(infection > 0.25, (before > 0.25) | (infection != before) & (raised > 0.25))
    # Around an added lesion a pixel is raised, too, at a corner and unless it is higher; further away none is.
    for near in ((1, 3 * unit, unit), (1, 3 * unit, 3 * unit), (1, unit, 3 * unit)):
        expected = max(raised[near], before[near]) if "a" in added else before[near]
        np.testing.assert_allclose(infection[near], expected, rtol=1e-6)
    assert infection[1, 3 * unit + 1, unit] == before[1, 3 * unit + 1, unit]
    np.testing.assert_array_equal(infection[2], before[2])
    np.testing.assert_array_equal(is_added, (infection > 0.25) & (before <= 0.25))
