import json

import numpy as np
import pytest
from scipy import ndimage

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import slice_box
from resunet_jax.data.readers import read_volume
from resunet_jax.data.roi import Box, body_columns, body_mask, bounding_box, crop_resize, resize_paste
from tests.conftest import REFERENCE, ROOT

REAL = ROOT.parent / "shared" / "data" / "covid19-ct-scans"


def test_box_of_the_largest_component() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:5, 3:6] = True
    mask[8:15, 10:25] = True
    assert bounding_box(mask) == Box(8, 10, 7, 15)


def test_diagonal_neighbours_belong_together() -> None:
    mask = np.eye(6, dtype=bool)
    assert bounding_box(mask) == Box(0, 0, 6, 6)


def test_columns_of_the_body_are_medians_over_its_boxes() -> None:
    assert body_columns(np.array([[1, 10, 50, 20], [2, 12, 60, 22], [9, 40, 3, 3]], np.int32)) == (12, 31)


def test_no_body_gives_the_whole_slice() -> None:
    assert bounding_box(np.zeros((5, 7), bool)) == Box(0, 0, 5, 7)


def test_dilation_grows_by_the_four_neighbours() -> None:
    image = np.zeros((21, 21), np.float32)
    image[10, 10] = 1
    rows, columns = np.nonzero(body_mask(image, 0.5, 5))
    assert np.all(np.abs(rows - 10) + np.abs(columns - 10) <= 5)
    assert len(rows) == 61
    assert body_mask(image, 0.5, 0).sum() == 1


def test_body_and_box_are_those_of_scipy(rng: np.random.Generator) -> None:
    for density, dilation in ((0.003, 5), (0.02, 1), (0.3, 0), (0.6, 0), (0.97, 3)):
        tissue = rng.random((61, 83)) < density
        expected = ndimage.binary_dilation(tissue, iterations=dilation) if dilation else tissue
        body = body_mask(tissue.astype(np.float32), 0.5, dilation)
        np.testing.assert_array_equal(body, expected)
        labels, _ = ndimage.label(expected, np.ones((3, 3)))
        rows, columns = ndimage.find_objects(labels)[int(np.bincount(labels.ravel())[1:].argmax())]
        assert bounding_box(body).slices == (rows, columns)


@pytest.mark.parametrize("box", [Box(0, 0, 16, 16), Box(3, 2, 16, 16), Box(4, 5, 16, 16)])
def test_crop_and_paste_are_exact_inverses_at_the_same_size(box: Box, rng: np.random.Generator) -> None:
    image = rng.random((21, 23), np.float32)
    crop = crop_resize(image, box, 16)
    np.testing.assert_array_equal(crop, image[box.slices])
    back = resize_paste(crop, box, image.shape)
    np.testing.assert_array_equal(back[box.slices], image[box.slices])
    back[box.slices] = 0
    assert not back.any()


@pytest.mark.parametrize("box", [Box(10, 20, 64, 96), Box(0, 0, 101, 131), Box(37, 3, 50, 120)])
def test_round_trip_does_not_shift(box: Box) -> None:
    """A disc keeps its place to a hundredth of a pixel through crop, resize and paste."""
    rows, columns = np.indices((101, 131))
    centre = (box.row + box.height * 0.45, box.column + box.width * 0.55)
    disc = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 15**2).astype(np.float32)
    back = resize_paste(crop_resize(disc, box, 48), box, disc.shape)
    for axis in (rows, columns):
        assert abs((axis * back).sum() / back.sum() - (axis * disc).sum() / disc.sum()) < 0.02
    assert 0 <= back.min() <= back.max() <= 1 + 1e-6


def test_shrinking_averages() -> None:
    stripes = np.tile(np.array([0.0, 1.0], np.float32), (64, 32))
    small = crop_resize(stripes, Box(0, 0, 64, 64), 8)
    np.testing.assert_allclose(small[1:-1, 1:-1], 0.5, atol=0.02)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not beside this checkout")
def test_boxes_agree_with_the_original() -> None:
    reference = json.loads((REFERENCE / "roi_boxes.json").read_text())
    overlaps = []
    for case in find_cases(REAL):
        volume = read_volume(case.ct)
        rows = volume.values.shape[0]
        for k, (column, row, width, height) in reference[case.id.removeprefix("radiopaedia_")].items():
            ours = slice_box(volume, int(k), PreprocessConfig())
            # np.rot90 of (x, y) arrays counts rows from the back.
            theirs = Box(rows - row - height, column, height, width)
            overlaps.append(overlap(ours, theirs))
    assert len(overlaps) == sum(map(len, reference.values()))
    assert np.mean(np.array(overlaps) >= 0.98) >= 0.95


def overlap(a: Box, b: Box) -> float:
    height = min(a.row + a.height, b.row + b.height) - max(a.row, b.row)
    width = min(a.column + a.width, b.column + b.width) - max(a.column, b.column)
    common = max(0, height) * max(0, width)
    return common / (a.height * a.width + b.height * b.width - common)
