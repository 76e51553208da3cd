"""Slices below and above as further channels."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.batches import SliceSource
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import context_slices, prepare_mask, prepare_volume, slice_box
from resunet_jax.data.readers import open_scan, read_mask, read_volume
from resunet_jax.data.roi import crop_resize
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.data.volume import Grid
from resunet_jax.inference import scan as module

CONFIG = PreprocessConfig(image_size=32, context_mm=5.0)


@pytest.mark.parametrize(
    ("spacing", "context_mm", "slices"),
    [(1.0, 5.0, 5), (1.25, 5.0, 4), (4.0, 5.0, 1), (6.0, 5.0, 1), (30.0, 5.0, 1), (1.0, 0.0, 0), (3.0, 5.0, 2)],
)
def test_neighbours_are_the_nearest_to_the_distance(spacing: float, context_mm: float, slices: int) -> None:
    grid = Grid((8, 8, 8), np.diag([-1, -1, spacing, 1]))
    assert context_slices(PreprocessConfig(context_mm=context_mm), grid) == slices


@pytest.mark.parametrize("context_mm", [5.0, 13.0])
def test_channels_are_the_slices_around_cropped_by_the_slices_own_box(phantom: Path, context_mm: float) -> None:
    config = dataclasses.replace(CONFIG, context_mm=context_mm)
    volume = read_volume(find_cases(phantom)[0].ct)
    step, count = context_slices(config, volume.grid), volume.values.shape[-1]
    images, boxes = prepare_volume(volume, config, 0.0)
    alone, same = prepare_volume(volume, dataclasses.replace(config, context_mm=0.0), 0.0)
    assert images.shape == (count, 32, 32, 3)
    np.testing.assert_array_equal(images[..., :1], alone)
    np.testing.assert_array_equal(boxes, same)
    for k in range(count):
        for channel, n in ((1, max(k - step, 0)), (2, min(k + step, count - 1))):
            expected = crop_resize(volume.normalize_hu(n), slice_box(volume, k, config), 32)
            np.testing.assert_array_equal(images[k, ..., channel], expected)
    assert images.flags.c_contiguous


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_some_slices_are_prepared_as_in_the_whole_scan(
    phantom: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_SLICES", step)
    case = find_cases(phantom)[0]
    whole, boxes = prepare_volume(read_volume(case.ct), CONFIG, 0.0)
    with open_scan(case.ct) as scan:
        chunks = list(module.iter_chunks(scan, CONFIG, 0.0))
    assert [start for start, _, _ in chunks] == list(range(0, len(whole), step))
    for start, some, own in chunks:
        np.testing.assert_array_equal(some, whole[start : start + step])
        np.testing.assert_array_equal(own, boxes[start : start + step])


def test_batches_have_the_infection_of_each_channel(phantom: Path, tmp_path: Path) -> None:
    cases = [find_cases(phantom)[0], dataclasses.replace(find_cases(phantom)[1], infection_mask=None)]
    prepared = prepare_cases(cases, CONFIG, tmp_path)
    volume = read_volume(cases[0].ct)
    step = context_slices(CONFIG, volume.grid)
    infection = read_mask(cases[0].infection_mask, cases[0].ct, volume.grid) > 0
    k = int(np.argmax(infection.any(axis=(0, 1))))  # the first infected slice: none below it
    box = slice_box(volume, k, CONFIG)
    for task in ("lung", "infection"):
        one = SliceSource(prepared if task == "lung" else prepared[:1], task).batch(np.array([k]), 1)
        assert (one["image"].shape, one["mask"].shape) == ((1, 32, 32, 3), (1, 32, 32, 4))
        np.testing.assert_array_equal(one["mask"][0, ..., 0], getattr(prepared[0], task)[k, ..., 0])
        for channel, n in enumerate((k, k - step, k + step), start=1):
            np.testing.assert_array_equal(one["mask"][0, ..., channel], crop_resize(infection[..., n], box, 32) > 0.5)
    source = SliceSource(prepared, "lung")
    unknown = source.batch(np.arange(len(prepared[0].images), len(source)), 64)["mask"]
    assert unknown[..., 0].any()
    assert not unknown[..., 1:].any()


def test_a_slice_without_mask_has_the_masks_of_its_neighbours() -> None:
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:24, 8:24, 1] = 1
    prepared = prepare_mask(mask, np.tile(np.array([0, 0, 32, 32], np.int32), (3, 1)), 16, 1)
    np.testing.assert_array_equal(
        prepared.any(axis=(1, 2)), [[False, False, True], [True, False, False], [False, True, False]]
    )


def test_a_mask_is_binarised_at_one_half() -> None:
    mask = np.zeros((32, 32, 1), np.uint8)
    mask[:, :15] = 1
    prepared = prepare_mask(mask, np.array([[0, 0, 32, 32]], np.int32), 8)
    assert prepared[0, 4, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
