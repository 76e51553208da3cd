from pathlib import Path

import numpy as np

from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import read_mask, read_volume
from resunet_jax.metrics.lung_sides import LEFT, RIGHT, split_lungs


def test_phantom_lungs_are_split_as_their_labels_are(phantom: Path) -> None:
    for case in find_cases(phantom):
        labels = read_mask(case.lung_mask, case.ct, read_volume(case.ct).grid)
        sides = split_lungs(labels > 0)
        np.testing.assert_array_equal(sides["left_lung"], labels == LEFT)
        np.testing.assert_array_equal(sides["right_lung"], labels == RIGHT)


def test_a_region_that_crosses_the_middle_follows_its_bulk_and_a_bridge_is_cut() -> None:
    mask = np.zeros((10, 40, 2), bool)
    mask[2:8, 4:17, :] = True  # the patient's right
    mask[2:8, 22:36, :] = True
    mask[2, 18:22, 0] = True  # a tip of the left one reaches over the middle
    mask[4, 17:22, 1] = True  # both are joined
    sides = split_lungs(mask)
    assert not (sides["left_lung"] & sides["right_lung"]).any()
    np.testing.assert_array_equal(sides["left_lung"] | sides["right_lung"], mask)
    assert sides["left_lung"][2, 18:22, 0].all()
    assert sides["right_lung"][:, :17, 1].sum() == mask[:, :17, 1].sum()
    assert sides["left_lung"][:, 22:, 1].sum() == mask[:, 22:, 1].sum()


def test_an_empty_mask_has_no_lungs() -> None:
    sides = split_lungs(np.zeros((4, 5, 6), bool))
    assert not sides["left_lung"].any()
    assert not sides["right_lung"].any()
