"""Models against references: per volume on its native grid, and the original's soft batches beside it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resunet_jax.data.prepared import PreparedCase
from resunet_jax.data.volumes import Array, FloatArray, Grid, read_mask, read_volume
from resunet_jax.evaluation.calibration import Calibration, calibrate
from resunet_jax.evaluation.lesions import LESION_METRICS, dice_by_load, lesion_metrics
from resunet_jax.evaluation.metrics import (
    COUNTS,
    HARD_METRICS,
    SOFT_METRICS,
    TOLERANCE_MM,
    count,
    emptiness,
    hard_metrics,
    soft_metrics,
)
from resunet_jax.evaluation.sides import LEFT, RIGHT, split_lungs
from resunet_jax.evaluation.statistics import describe
from resunet_jax.evaluation.surface import SURFACE_METRICS, surface_metrics
from resunet_jax.figures import Overlay
from resunet_jax.inference.segment import Segmenter, native_slices
from resunet_jax.progress import progress

SOFT_BATCH_SIZE = 4
"""Slices a batch in the original's testing."""

STRUCTURES = ("lung", "left_lung", "right_lung", "infection")
METRICS = (*HARD_METRICS, *SURFACE_METRICS, *LESION_METRICS, "volume_error_ml", "lung_part_error")
"""What is summarised over volumes."""

_SOFT_NOTE = (
    f"Soft counts over batches of {SOFT_BATCH_SIZE} slices of the model grid, averaged over batches, as the original "
    "project reported. They are low whatever the model: in a batch without the structure nothing can be hit, so every "
    "probability above zero drives Dice and precision to 0, and such batches weigh as much as full ones (half of the "
    "slices show no infection). Compare them with the original's numbers, never with the Dice of volumes."
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; undefined values are NaN.

    Attributes:
      volumes: a row a case and structure on the native grid: "case", "patient", "structure", `METRICS`, the counts in
        voxels, "volume_ml" and "reference_ml", for the infection alone `LESION_METRICS`, "lung_part" and
        "reference_lung_part" (the part of the lung that is infected, in [0, 1]), and "empty", which tells whether a
        mask is empty (see `emptiness`).
        "volume_error_ml" and "lung_part_error" are predicted minus reference.
      slices: a row a case, structure and native slice: "case", "structure", "slice" (0 is the lowest), the counts.
      model_grid: the volumes counted on the cropped and resized slices that the model sees; hard metrics only.
      soft_batch: {structure: the original's soft metrics, mean over batches of 4 slices}.
      calibration: {structure: over all pixels of the model grid}.
      overlays: (Dice, slice) of each case: the slice with most of the reference.
      settings: what the numbers depend on: "protocol", "threshold", "smallest_region", "tolerance_mm".
    """

    volumes: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    model_grid: list[dict[str, Any]]
    soft_batch: dict[str, dict[str, float]]
    calibration: dict[str, Calibration]
    overlays: list[tuple[float, Overlay]]
    settings: dict[str, Any]

    def to_json(self) -> str:
        """For metrics.json; undefined values are null."""
        values = {
            "settings": self.settings,
            "volumes": self.volumes,
            "summary": summarize(self.volumes),
            "infection_dice_by_load": dice_by_load(self.volumes),
            "model_grid": self.model_grid,
            "calibration": {s: calibration.to_dict() for s, calibration in self.calibration.items()},
            "soft_batch": {"note": _SOFT_NOTE, **self.soft_batch},
        }
        return json.dumps(nan_to_none(values), indent=2) + "\n"

    @property
    def soft_note(self) -> str:
        """Why the soft numbers are low."""
        return _SOFT_NOTE


def summarize(volumes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{structure: {metric: see `describe`}} over rows as in `Evaluation.volumes`."""
    groups = {s: [row for row in volumes if row["structure"] == s] for s in STRUCTURES}
    return {
        structure: {
            metric: describe([row[metric] for row in group], [row["patient"] for row in group]) for metric in METRICS
        }
        for structure, group in groups.items()
        if group
    }


def evaluate_cases(
    segmenter: Segmenter,
    cases: Sequence[PreparedCase],
    *,
    tolerance_mm: Mapping[str, float] = TOLERANCE_MM,
    protocol: str = "",
) -> Evaluation:
    """Segments each case and compares it with its reference masks.

    Args:
      segmenter: the models and their thresholds.
      cases: prepared as `segmenter.preprocess` says; those without an infection mask are compared for the lung only.
      tolerance_mm: of the surface Dice, for "lung" and "infection".
      protocol: by which the cases were chosen; goes into the settings.

    Raises:
      InputError: a file that was readable before no longer is.
    """
    soft = {structure: _SoftBatches() for structure in segmenter.structures}
    calibration: dict[str, Calibration] = {}
    volumes, slices, model_grid, overlays = [], [], [], []
    with progress("evaluating", len(cases)) as advance:
        for prepared in cases:
            probabilities = segmenter.probabilities(prepared.images)
            segmenter.clean(probabilities)
            for structure in segmenter.structures:
                target = getattr(prepared, structure)
                if target is not None:
                    soft[structure].add(probabilities[structure], target)
                    counted = calibrate(probabilities[structure], target)
                    calibration[structure] = calibration[structure] + counted if structure in calibration else counted
                    counts = count(probabilities[structure] > segmenter.threshold(structure), target > 0)
                    model_grid.append({**_names(prepared, structure), **hard_metrics(counts), **counts})
            native = _compare_native(segmenter, prepared, probabilities, tolerance_mm)
            volumes += native.volumes
            slices += native.slices
            overlays.append(native.overlay)
            advance(prepared.case.id)
    settings = {
        "protocol": protocol,
        "threshold": {s: segmenter.threshold(s) for s in segmenter.structures},
        "smallest_region": segmenter.smallest_region,
        "tolerance_mm": dict(tolerance_mm),
    }
    soft_batch = {s: batches.mean() for s, batches in soft.items()}
    return Evaluation(volumes, slices, model_grid, soft_batch, calibration, overlays, settings)


@dataclasses.dataclass(frozen=True)
class _Native:
    volumes: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    overlay: tuple[float, Overlay]


def _compare_native(
    segmenter: Segmenter,
    prepared: PreparedCase,
    probabilities: Mapping[str, FloatArray],
    tolerance_mm: Mapping[str, float],
) -> _Native:
    case = prepared.case
    volume = read_volume(case.ct)
    predicted: dict[str, Array] = {
        name: np.stack(
            [
                slice_ > segmenter.threshold(name)
                for slice_ in native_slices(probability, prepared.boxes, volume.values.shape[:2])
            ],
            axis=-1,
        )
        for name, probability in probabilities.items()
    }
    labels = read_mask(case.lung_mask, case.ct, volume.grid)
    reference: dict[str, Array] = {"lung": labels > 0}
    if case.infection_mask is not None:
        reference["infection"] = read_mask(case.infection_mask, case.ct, volume.grid) > 0
    if "lung" in predicted and (labels == LEFT).any() and (labels == RIGHT).any():
        predicted |= split_lungs(predicted["lung"])
        reference |= {"left_lung": labels == LEFT, "right_lung": labels == RIGHT}

    compared = [s for s in STRUCTURES if s in predicted and s in reference]
    parts = {"lung_part": _lung_part(predicted), "reference_lung_part": _lung_part(reference)}
    rows, slices = [], []
    for structure in compared:
        tolerance = tolerance_mm["infection" if structure == "infection" else "lung"]
        row = _row(predicted[structure], reference[structure], volume.grid, tolerance)
        infected = dict.fromkeys((*parts, *LESION_METRICS), math.nan)
        if structure == "infection":
            infected = parts | lesion_metrics(predicted[structure], reference[structure], volume.grid.voxel_ml)
        error = infected["lung_part"] - infected["reference_lung_part"]
        rows.append({**_names(prepared, structure), **row, **infected, "lung_part_error": error})
        slices += [
            {"case": case.id, "structure": structure, "slice": k, **count(p, r)}
            for k, (p, r) in enumerate(
                zip(np.moveaxis(predicted[structure], -1, 0), np.moveaxis(reference[structure], -1, 0), strict=True)
            )
        ]
    main = compared[-1]  # the infection, where there is one
    shown = next((reference[s] for s in (main, compared[0]) if reference[s].any()), reference[main])
    k = int(np.argmax(shown.sum(axis=(0, 1))))
    overlay = Overlay(
        f"{case.id} slice {k}",
        volume.window(k),
        {s: reference[s][..., k] for s in compared if s in segmenter.structures},
        {s: predicted[s][..., k] for s in compared if s in segmenter.structures},
    )
    return _Native(rows, slices, (rows[-1]["dice"], overlay))


def _row(predicted: Array, reference: Array, grid: Grid, tolerance_mm: float) -> dict[str, Any]:
    counts = count(predicted, reference)
    volume_ml = (counts["tp"] + counts["fp"]) * grid.voxel_ml
    reference_ml = (counts["tp"] + counts["fn"]) * grid.voxel_ml
    return {
        **hard_metrics(counts),
        **surface_metrics(predicted, reference, grid.spacing_mm, tolerance_mm),
        "volume_ml": volume_ml,
        "reference_ml": reference_ml,
        "volume_error_ml": volume_ml - reference_ml,
        **{name: counts[name] for name in COUNTS},
        "empty": emptiness(counts),
    }


def _lung_part(masks: Mapping[str, Array]) -> float:
    """The part of the lung that is infected; NaN where one of the masks is not there, or the lung is empty."""
    if "lung" not in masks or "infection" not in masks or not masks["lung"].any():
        return math.nan
    return float(np.count_nonzero(masks["infection"] & masks["lung"]) / np.count_nonzero(masks["lung"]))


def _names(prepared: PreparedCase, structure: str) -> dict[str, Any]:
    return {"case": prepared.case.id, "patient": prepared.case.patient, "structure": structure}


class _SoftBatches:
    """The original's test loader: slices of all volumes in a row, cut into batches that do not respect volumes."""

    def __init__(self) -> None:
        self._rest: list[tuple[FloatArray, Array]] = []
        self._metrics: list[dict[str, float]] = []

    def add(self, probabilities: FloatArray, targets: Array) -> None:
        self._rest += zip(probabilities, targets, strict=True)
        while len(self._rest) >= SOFT_BATCH_SIZE:
            self._flush()

    def _flush(self) -> None:
        batch, self._rest = self._rest[:SOFT_BATCH_SIZE], self._rest[SOFT_BATCH_SIZE:]
        self._metrics.append(soft_metrics(np.stack([p for p, _ in batch]), np.stack([t for _, t in batch])))

    def mean(self) -> dict[str, float]:
        if self._rest:
            self._flush()
        return {
            name: float(np.mean([m[name] for m in self._metrics])) if self._metrics else math.nan
            for name in SOFT_METRICS
        }


def nan_to_none(value: Any) -> Any:
    """NaN, which JSON does not have, as null, at any depth of dicts and lists."""
    if isinstance(value, dict):
        return {name: nan_to_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
