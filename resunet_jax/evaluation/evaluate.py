"""Models against references: per volume on its native grid, and the original's soft batches beside it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resunet_jax.data.prepared import PreparedCase
from resunet_jax.data.volumes import Array, FloatArray, read_mask, read_volume
from resunet_jax.evaluation.metrics import COUNTS, HARD_METRICS, count, emptiness, hard_metrics, soft_metrics
from resunet_jax.figures import Overlay
from resunet_jax.inference.segment import THRESHOLD, Segmenter, native_slices
from resunet_jax.progress import progress

SOFT_BATCH_SIZE = 4
"""Slices a batch in the original's testing."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; undefined values are NaN.

    Attributes:
      volumes: a row a case and structure: "case", "patient", "structure", the hard metrics, the counts in voxels of the
        native grid, and "empty", which tells whether a mask is empty (see `emptiness`).
      model_grid: the same rows counted on the cropped and resized slices that the model sees.
      soft_batch: {structure: the original's soft metrics, mean over batches of 4 slices}.
      overlays: of each case, the slice with most of the reference.
    """

    volumes: list[dict[str, Any]]
    model_grid: list[dict[str, Any]]
    soft_batch: dict[str, dict[str, float]]
    overlays: list[Overlay]

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """{structure: {metric: {"mean", "sd", "median", "volumes", "undefined"}}} over the native volumes.

        Undefined values are left out of mean, SD and median, and counted in "undefined". The SD has n - 1 below.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.volumes:
            rows.setdefault(row["structure"], []).append(row)
        return {
            structure: {metric: _describe([row[metric] for row in group]) for metric in HARD_METRICS}
            for structure, group in rows.items()
        }

    def to_json(self) -> str:
        """For metrics.json; undefined values are null."""
        values = {
            "volumes": self.volumes,
            "summary": self.summary(),
            "model_grid": self.model_grid,
            "soft_batch": {
                "note": f"soft counts over batches of {SOFT_BATCH_SIZE} slices, as the original project reported; "
                "near 0 on batches without the structure; not comparable with the Dice of volumes",
                **self.soft_batch,
            },
        }
        return json.dumps(_nan_to_none(values), indent=2) + "\n"


def evaluate_cases(segmenter: Segmenter, cases: Sequence[PreparedCase]) -> Evaluation:
    """Segments each case and compares it with its reference masks.

    Args:
      segmenter: the models.
      cases: prepared as `segmenter.preprocess` says; those without an infection mask are compared for the lung only.

    Raises:
      InputError: a file that was readable before no longer is.
    """
    soft = {structure: _SoftBatches() for structure in segmenter.structures}
    volumes, model_grid, overlays = [], [], []
    with progress("evaluating", len(cases)) as advance:
        for prepared in cases:
            probabilities = segmenter.probabilities(prepared.images)
            compared = [s for s in segmenter.structures if getattr(prepared, s) is not None]
            for structure in compared:
                target = getattr(prepared, structure)
                soft[structure].add(probabilities[structure], target)
                counts = count(probabilities[structure] > THRESHOLD, target > 0)
                model_grid.append(_row(prepared, structure, counts))
            native, overlay = _compare_native(prepared, {s: probabilities[s] for s in compared})
            volumes += native
            overlays.append(overlay)
            advance(prepared.case.id)
    return Evaluation(volumes, model_grid, {s: batches.mean() for s, batches in soft.items()}, overlays)


def _compare_native(
    prepared: PreparedCase, probabilities: Mapping[str, FloatArray]
) -> tuple[list[dict[str, Any]], Overlay]:
    case = prepared.case
    volume = read_volume(case.ct)
    paths = {"lung": case.lung_mask, "infection": case.infection_mask}
    references: dict[str, Array] = {}
    predictions: dict[str, Array] = {}
    for structure, probability in probabilities.items():
        path = paths[structure]
        assert path is not None
        references[structure] = read_mask(path, case.ct, volume.grid) > 0
        slices = native_slices(probability, prepared.boxes, volume.values.shape[:2])
        predictions[structure] = np.stack([slice_ > THRESHOLD for slice_ in slices], axis=-1)
    rows = [_row(prepared, s, count(predictions[s], references[s])) for s in probabilities]
    by_interest = [references[s] for s in ("infection", "lung") if s in references]
    shown = next((reference for reference in by_interest if reference.any()), by_interest[0])
    k = int(np.argmax(shown.sum(axis=(0, 1))))
    overlay = Overlay(
        f"{case.id} slice {k}",
        volume.window(k),
        {s: mask[..., k] for s, mask in references.items()},
        {s: mask[..., k] for s, mask in predictions.items()},
    )
    return rows, overlay


def _row(prepared: PreparedCase, structure: str, counts: dict[str, int]) -> dict[str, Any]:
    case = prepared.case
    return {
        "case": case.id,
        "patient": case.patient,
        "structure": structure,
        **hard_metrics(counts),
        **{name: counts[name] for name in COUNTS},
        "empty": emptiness(counts),
    }


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
            for name in HARD_METRICS
        }


def _describe(values: list[float]) -> dict[str, float]:
    defined = np.array([value for value in values if not math.isnan(value)])
    return {
        "mean": float(defined.mean()) if len(defined) else math.nan,
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 else math.nan,
        "median": float(np.median(defined)) if len(defined) else math.nan,
        "volumes": len(values),
        "undefined": len(values) - len(defined),
    }


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nan_to_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
