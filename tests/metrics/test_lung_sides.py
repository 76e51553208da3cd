from pathlib import Path

import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import prepare_volume
from resunet_jax.data.readers import read_mask, read_volume
from resunet_jax.evaluation.compare import body_columns
from resunet_jax.metrics.lung_sides import LEFT, RIGHT, sagittal_plane, split_lungs


@pytest.mark.parametrize("missing", [None, "left", "right"])
@pytest.mark.parametrize("kept", [0.0, 0.1])
def test_phantom_lungs_are_split_as_their_labels_are(phantom: Path, missing: str | None, kept: float) -> None:
    """Also where one lung is missing or small, as in a white-out."""
    for case in find_cases(phantom)[:3]:
        volume = read_volume(case.ct)
        labels = read_mask(case.lung_mask, case.ct, volume.grid)
        _, boxes = prepare_volume(volume, PreprocessConfig(image_size=32))
        if missing:
            label = LEFT if missing == "left" else RIGHT
            slices = np.flatnonzero((labels == label).any(axis=(0, 1)))
            gone = slices[int(kept * len(slices)) :]
            labels[..., gone] = np.where(labels[..., gone] == label, 0, labels[..., gone])
        sides = split_lungs(labels > 0, body_columns(boxes))
        np.testing.assert_array_equal(sides["left_lung"], labels == LEFT)
        np.testing.assert_array_equal(sides["right_lung"], labels == RIGHT)


def test_a_component_that_crosses_the_middle_follows_its_bulk_and_a_bridge_is_cut() -> None:
    mask = np.zeros((10, 40, 2), bool)
    mask[2:8, 4:17, :] = True  # the patient's right
    mask[2:8, 22:36, :] = True
    mask[2, 18:22, 0] = True  # a tip of the left one reaches over the middle
    mask[4, 17:22, 1] = True  # both are joined
    sides = split_lungs(mask, (0, 39))
    assert not (sides["left_lung"] & sides["right_lung"]).any()
    np.testing.assert_array_equal(sides["left_lung"] | sides["right_lung"], mask)
    assert sides["left_lung"][2, 18:22, 0].all()
    assert sides["right_lung"][:, :17, 1].sum() == mask[:, :17, 1].sum()
    assert sides["left_lung"][:, 22:, 1].sum() == mask[:, 22:, 1].sum()


def test_joined_lungs_of_unequal_size_are_cut() -> None:
    mask = np.zeros((10, 40, 1), bool)
    mask[2:8, 8:28] = True  # three fifths of it are the patient's right
    mask[3:8, 19:21] = False
    sides = split_lungs(mask, (0, 39))
    assert sides["right_lung"][:, 8:19].sum() == mask[:, 8:19].sum()
    assert sides["left_lung"][:, 21:28].sum() == mask[:, 21:28].sum()


def test_the_plane_is_the_middle_of_the_gap_near_the_middle_of_the_body() -> None:
    profile = np.full(100, 9)
    profile[44:57] = 0
    assert sagittal_plane(profile, (0, 99)) == 50
    profile[15:20] = 0
    assert sagittal_plane(profile, (0, 99)) == 50


def test_one_lung_alone_is_not_cut() -> None:
    mask = np.zeros((10, 40, 3), bool)
    mask[2:8, 5:16, :] = True
    sides = split_lungs(mask, (2, 37))
    np.testing.assert_array_equal(sides["right_lung"], mask)
    assert not sides["left_lung"].any()


def test_an_empty_mask_has_no_lungs() -> None:
    sides = split_lungs(np.zeros((4, 5, 6), bool), (0, 4))
    assert not sides["left_lung"].any()
    assert not sides["right_lung"].any()
