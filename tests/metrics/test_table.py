"""The table of metrics, and the keys of older files."""

import math

import numpy as np
import pytest

from resunet_jax.metrics import LEGACY_KEYS, METRICS, Comparison, with_legacy_keys
from resunet_jax.metrics.lesions import lesion_metrics
from resunet_jax.metrics.overlap import confusion_counts, hard_metrics
from resunet_jax.metrics.surface import surface_metrics

SPACING_MM, VOXEL_ML, TOLERANCE_MM = (2.0, 3.0, 5.0), 0.03, 3.0


@pytest.fixture
def masks(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Predicted and reference lung and infection, of which some lies outside the lung."""
    predicted, reference = (
        {"lung": rng.random((9, 8, 7)) > 0.4, "infection": rng.random((9, 8, 7)) > 0.9} for _ in range(2)
    )
    return predicted, reference


def values(comparison: Comparison) -> dict[str, float]:
    return {name: metric.value(comparison) for name, metric in METRICS.items()}


@pytest.mark.parametrize("structure", ["lung", "infection"])
def test_rows_are_the_functions(masks, structure: str) -> None:
    predicted, reference = masks[0][structure], masks[1][structure]
    found = values(Comparison(structure, *masks, SPACING_MM, VOXEL_ML, TOLERANCE_MM))
    is_infection = structure == "infection"
    lesions = lesion_metrics(predicted, reference, VOXEL_ML) if is_infection else {}
    involvement = [(m["infection"] & m["lung"]).sum() / m["lung"].sum() for m in masks]
    expected = {
        **hard_metrics(confusion_counts(predicted, reference)),
        **surface_metrics(predicted, reference, SPACING_MM, TOLERANCE_MM),
        "lesion_recall": lesions.get("lesion_recall", math.nan),
        "false_positive_lesions": lesions.get("false_positive_lesions", math.nan),
        "volume_error_ml": predicted.sum() * VOXEL_ML - reference.sum() * VOXEL_ML,
        "lung_involvement_error": involvement[0] - involvement[1] if is_infection else math.nan,
    }
    assert set(found) >= set(expected)
    np.testing.assert_equal({name: found[name] for name in expected}, expected)


def test_units_and_headings() -> None:
    units = {name: metric.unit for name, metric in METRICS.items()}
    assert (units["dice"], units["hd95_mm"], units["volume_error_ml"]) == ("", "mm", "ml")
    headings = [metric.heading for metric in METRICS.values()]
    assert all(headings)
    assert len(set(headings)) == len(METRICS)


@pytest.mark.parametrize("missing", ["predicted", "reference", "no lung"])
def test_involvement_is_undefined_without_a_lung(masks, missing: str) -> None:
    predicted, reference = masks
    if missing == "no lung":
        predicted["lung"][:] = False
    else:
        del {"predicted": predicted, "reference": reference}[missing]["lung"]
    found = values(Comparison("infection", predicted, reference, SPACING_MM, VOXEL_ML, TOLERANCE_MM))
    assert math.isnan(found["lung_involvement_error"])
    assert not math.isnan(found["dice"])


def test_legacy_keys_are_added() -> None:
    row = {
        "case": "a",
        "false_positive_lesions": 0.0,
        "lung_involvement": 0.1,
        "reference_lung_involvement": 0.2,
        "lung_involvement_error": 0.3,
    }
    old = {"false_lesions": 0.0, "lung_part": 0.1, "reference_lung_part": 0.2, "lung_part_error": 0.3}
    assert with_legacy_keys(row) == {**row, **old}
    assert list(with_legacy_keys(row)) == [*row, *old]
    assert list(old) == list(LEGACY_KEYS)
