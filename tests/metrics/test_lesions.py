import math

import numpy as np
import pytest

from resunet_jax.metrics.lesions import dice_by_burden, lesion_metrics


def masks() -> tuple[np.ndarray, np.ndarray]:
    """(predicted, reference) with voxels of 0.05 ml, so that two voxels are a lesion."""
    return np.zeros((2, 8, 8, 8), bool)


def test_found_missed_and_invented() -> None:
    predicted, reference = masks()
    reference[0:2, 0, 0] = reference[0:2, 4, 4] = reference[6:8, 7, 7] = True  # three lesions
    predicted[1:3, 0, 0] = True  # finds the first by one voxel
    predicted[4:6, 0, 7] = predicted[0:2, 7, 0] = True  # two inventions
    assert lesion_metrics(predicted, reference, 0.05) == {
        "lesion_recall": pytest.approx(1 / 3),
        "false_positive_lesions": 2,
    }


def test_what_touches_at_a_corner_is_one_lesion() -> None:
    predicted, reference = masks()
    reference[1, 1, 1] = reference[2, 2, 2] = True
    assert lesion_metrics(reference, reference, 0.05) == {"lesion_recall": 1, "false_positive_lesions": 0}
    assert lesion_metrics(predicted, reference, 0.05)["lesion_recall"] == 0


def test_specks_are_no_lesions() -> None:
    predicted, reference = masks()
    reference[1, 1, 1] = predicted[5, 5, 5] = True
    values = lesion_metrics(predicted, reference, 0.05)
    assert math.isnan(values["lesion_recall"])
    assert values["false_positive_lesions"] == 0


@pytest.mark.parametrize("where", ["neither", "reference", "predicted"])
def test_empty_masks(where: str) -> None:
    predicted, reference = masks()
    {"reference": reference, "predicted": predicted, "neither": reference[:0]}[where][:2] = True
    values = lesion_metrics(predicted, reference, 1.0)
    assert math.isnan(values["lesion_recall"]) == (where != "reference")
    assert values["lesion_recall"] == 0 or where != "reference"
    assert values["false_positive_lesions"] == (where == "predicted")


def test_dice_by_burden() -> None:
    def row(dice: float, involvement: float, structure: str = "infection") -> dict:
        return {"structure": structure, "dice": dice, "reference_lung_involvement": involvement}

    rows = [row(0.2, 0.0), row(0.4, 0.0099), row(0.5, 0.01), row(0.9, 1.0), row(math.nan, 0.05), row(1, 0.05, "lung")]
    rows += [row(0.7, 0.1), row(0.8, 0.15)]
    assert dice_by_burden([*rows, row(0.7, math.nan)]) == {
        "under 1 %": {"mean": pytest.approx(0.3), "volumes": 2},
        "1–10 %": {"mean": 0.5, "volumes": 1},
        "over 10 %": {"mean": pytest.approx(0.8), "volumes": 3},
    }
