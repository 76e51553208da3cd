"""Numbers from masks and probabilities, without JAX; a metric is one function and one row of `METRICS`."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resunet_jax.errors import InputError
from resunet_jax.metrics.lesions import lesion_metrics
from resunet_jax.metrics.overlap import COUNTS, confusion_counts, hard_metrics
from resunet_jax.metrics.surface import surface_metrics

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A predicted and a reference mask of one structure in one scan; what several metrics need is computed once.

    Attributes:
      structure: "lung", "left_lung", "right_lung" or "infection".
      predicted: by structure, bool (rows, columns, slices) on the scan's own grid.
      reference: the same.
      spacing_mm: voxel size along each axis; None where the axes are not at right angles.
      voxel_ml: volume of a voxel.
      tolerance_mm: of the surface Dice.
    """

    structure: str
    predicted: Mapping[str, Mask]
    reference: Mapping[str, Mask]
    spacing_mm: tuple[float, float, float] | None
    voxel_ml: float
    tolerance_mm: float

    @property
    def masks(self) -> tuple[Mask, Mask]:
        """Predicted and reference mask of the structure."""
        return self.predicted[self.structure], self.reference[self.structure]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Confusion counts in voxels."""
        return {name: int(count) for name, count in confusion_counts(*self.masks).items()}

    @property
    def volumes_ml(self) -> tuple[float, float]:
        """Predicted and reference volume."""
        counts = self.counts
        return (counts["tp"] + counts["fp"]) * self.voxel_ml, (counts["tp"] + counts["fn"]) * self.voxel_ml

    @cached_property
    def overlap(self) -> dict[str, float]:
        """See `hard_metrics`."""
        return hard_metrics(self.counts)

    @cached_property
    def surface(self) -> dict[str, float]:
        """See `surface_metrics`; undefined on a sheared grid, where distances are not spacing times voxels."""
        if self.spacing_mm is None:
            return {"nsd": math.nan, "hd95_mm": math.nan}
        return surface_metrics(*self.masks, self.spacing_mm, self.tolerance_mm)

    @cached_property
    def lesions(self) -> dict[str, float]:
        """See `lesion_metrics`; undefined for other structures than the infection."""
        if self.structure != "infection":
            return {"lesion_recall": math.nan, "false_positive_lesions": math.nan}
        return lesion_metrics(*self.masks, self.voxel_ml)

    @cached_property
    def lung_involvement(self) -> tuple[float, float]:
        """Infected fraction of the lung, predicted and reference; undefined for other structures than the infection."""
        if self.structure != "infection":
            return math.nan, math.nan
        return _lung_involvement(self.predicted), _lung_involvement(self.reference)


def _lung_involvement(masks: Mapping[str, Mask]) -> float:
    """In [0, 1]; NaN where one of the masks is missing, or the lung is empty."""
    if "lung" not in masks or "infection" not in masks or not masks["lung"].any():
        return math.nan
    return float(np.count_nonzero(masks["infection"] & masks["lung"]) / np.count_nonzero(masks["lung"]))


class Metric(NamedTuple):
    """One number of a comparison.

    Attributes:
      value: NaN where it is undefined.
      heading: of its column in tables.
      unit: of the value, or "" for a fraction or a count.
    """

    value: Callable[[Comparison], float]
    heading: str
    unit: str = ""


METRICS: dict[str, Metric] = {
    "dice": Metric(lambda c: c.overlap["dice"], "Dice"),
    "iou": Metric(lambda c: c.overlap["iou"], "IoU"),
    "precision": Metric(lambda c: c.overlap["precision"], "precision"),
    "recall": Metric(lambda c: c.overlap["recall"], "recall"),
    "specificity": Metric(lambda c: c.overlap["specificity"], "specif."),
    "accuracy": Metric(lambda c: c.overlap["accuracy"], "accuracy"),
    "nsd": Metric(lambda c: c.surface["nsd"], "NSD"),
    "hd95_mm": Metric(lambda c: c.surface["hd95_mm"], "HD95", "mm"),
    "lesion_recall": Metric(lambda c: c.lesions["lesion_recall"], "lesion sens."),
    "false_positive_lesions": Metric(lambda c: c.lesions["false_positive_lesions"], "FP lesions"),
    "volume_error_ml": Metric(lambda c: c.volumes_ml[0] - c.volumes_ml[1], "error", "ml"),
    "lung_involvement_error": Metric(lambda c: c.lung_involvement[0] - c.lung_involvement[1], "involvement error"),
}
"""By the name in rows and files, in the order of columns."""

LEGACY_KEYS = {
    "false_lesions": "false_positive_lesions",
    "lung_part": "lung_involvement",
    "reference_lung_part": "reference_lung_involvement",
    "lung_part_error": "lung_involvement_error",
}
"""Keys of 0.6.0 and before, which files keep next to today's."""


COLUMNS = (
    *("case", "patient", "protocol", "structure", "fold", "volume_ml", "reference_ml", *COUNTS, "empty"),
    *("lung_involvement", "reference_lung_involvement", "seen_in", "pairwise_dice"),
    *("volume_low_ml", "volume_high_ml", "involvement_low_percent", "involvement_high_percent", *LEGACY_KEYS),
)
"""What rows hold beside metrics; no metric can have such a name."""


def check_names(metrics: Iterable[str], source: str = "metrics") -> None:
    """Raises `InputError`, which begins with the source, where a metric has the name of another column."""
    for name in metrics:
        if name in COLUMNS:
            raise InputError(f"{source}: a row has another column of the name {name!r}; rename the metric")


def with_legacy_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is written: today's keys, then those of 0.6.0 that are called otherwise today."""
    return {**row, **{old: row[new] for old, new in LEGACY_KEYS.items() if new in row}}
