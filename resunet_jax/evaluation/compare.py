"""Models against references: per volume on its native grid, and by the original's batch-wise soft Dice."""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resunet_jax.data.readers import READERS, Reader, read_mask, read_volume
from resunet_jax.data.roi import body_columns
from resunet_jax.data.slice_cache import PreparedCase
from resunet_jax.data.volume import Array, FloatArray, Volume
from resunet_jax.files import json_text
from resunet_jax.inference.predictor import Predictor
from resunet_jax.inference.uncertainty import compare_members
from resunet_jax.metrics import METRICS, Comparison, Metric, check_names, with_legacy_keys
from resunet_jax.metrics.calibration import LOGIT_BINS, Calibration, LogitHistogram, calibration_sums, logit_histogram
from resunet_jax.metrics.intervals import summary_statistics
from resunet_jax.metrics.lesions import dice_by_burden
from resunet_jax.metrics.lung_sides import LEFT, RIGHT, labels_are_exchanged, split_lungs
from resunet_jax.metrics.overlap import (
    COUNTS,
    SOFT_METRICS,
    TOLERANCE_MM,
    confusion_counts,
    empty_masks,
    hard_metrics,
    soft_metrics,
)
from resunet_jax.plots import Overlay
from resunet_jax.progress import logger, progress

SOFT_BATCH_SIZE = 4
"""Slices per batch in the original's testing."""

STRUCTURES = ("lung", "left_lung", "right_lung", "infection")

SOFT_NOTE = (
    f"Soft counts over batches of {SOFT_BATCH_SIZE} slices of the model grid, averaged over batches, as the original "
    "project reported. They are low whatever the model: in a batch without the structure nothing can be hit, so every "
    "probability above zero drives Dice and precision to 0, and such batches weigh as much as full ones (half of the "
    "slices show no infection). Compare them with the original's numbers, never with the Dice of volumes."
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; undefined values are NaN.

    Attributes:
      volumes: one row per case and structure on the native grid: "case", "patient", "structure", the metrics, the
        counts in voxels, "volume_ml" and "reference_ml", for the infection alone "lung_involvement" and
        "reference_lung_involvement" (the infected fraction of the lung), and "empty", which tells whether a mask is
        empty (see `empty_masks`), and "seen_in", "train" or "val" for patients that one of the models has seen there.
        Errors are predicted minus reference. Where members were compared, "pairwise_dice" (see `compare_members`);
        where there is a record of errors, "volume_low_ml", "volume_high_ml", "involvement_low_percent" and
        "involvement_high_percent", the interval. Both are NaN but for the infection.
      slices: one row per case, structure and native slice: "case", "structure", "slice" (0 is the lowest), the counts.
      model_grid: the volumes counted on the cropped and resized slices that the model sees; hard metrics only.
      soft_batch: {structure: the original's soft metrics, mean over batches of 4 slices}.
      calibration: {structure: over all pixels of the model grid}, of the probabilities that masks are made of.
      logits: {patient: of the infection, over the pixels of the model grid that postprocessing has left}.
      overlays: (Dice, slice) of each case: the slice with most of the reference.
      settings: what the numbers depend on: "protocol", "seen_patients", "threshold",
        "min_component_fraction", "infection_postprocess", "tolerance_mm"; with a record "temperature" and "interval".
      metrics: the table that the rows have columns of.
    """

    volumes: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    model_grid: list[dict[str, Any]]
    soft_batch: dict[str, dict[str, float]]
    calibration: dict[str, Calibration]
    overlays: list[tuple[float, Overlay]]
    settings: dict[str, Any]
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=lambda: METRICS)
    logits: dict[str, LogitHistogram] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """For metrics.json; undefined values are null, and renamed keys of 0.6.0 are repeated under their old name."""
        by_burden = dice_by_burden(self.volumes)
        values: dict[str, Any] = {
            "settings": {**self.settings, "smallest_region": self.settings["min_component_fraction"]},
            "volumes": [with_legacy_keys(row) for row in self.volumes],
            "summary": {s: with_legacy_keys(row) for s, row in summarize(self.volumes, self.metrics).items()},
            "infection_dice_by_burden": by_burden,
            "infection_dice_by_load": by_burden,
            "model_grid": self.model_grid,
            "calibration": {s: calibration.to_dict() for s, calibration in self.calibration.items()},
            "soft_batch": {"note": SOFT_NOTE, **self.soft_batch},
            **({"reported_calibration": self.reported_calibration()} if "temperature" in self.settings else {}),
        }
        return json_text(values)

    def reported_calibration(self) -> dict[str, dict[str, Any]]:
        """Of the infection's probability where postprocessing has left any: without and with the temperature."""
        if not self.logits:
            return {}
        logits = sum(self.logits.values(), start=LogitHistogram(np.zeros((2, LOGIT_BINS))))
        temperatures = {"without_temperature": 1.0, "with_temperature": self.settings["temperature"]}
        return {name: logits.calibration(temperature).to_dict() for name, temperature in temperatures.items()}


def summarize(
    volumes: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric] = METRICS
) -> dict[str, dict[str, dict[str, float]]]:
    """{structure: {metric: see `summary_statistics`}} over rows as in `Evaluation.volumes`."""
    groups = {s: [row for row in volumes if row["structure"] == s] for s in STRUCTURES}
    return {
        structure: {
            metric: summary_statistics([row[metric] for row in group], [row["patient"] for row in group])
            for metric in metrics
        }
        for structure, group in groups.items()
        if group
    }


def evaluate_cases(
    predictor: Predictor,
    cases: Sequence[PreparedCase],
    *,
    tolerance_mm: Mapping[str, float] = TOLERANCE_MM,
    protocol: str = "",
    uncertainty: bool = False,
    metrics: Mapping[str, Metric] = METRICS,
    readers: Mapping[str, Reader] = READERS,
) -> Evaluation:
    """Segments each case and compares it with its reference masks.

    Args:
      predictor: the models and their thresholds.
      cases: prepared as `predictor.preprocess` says; those without an infection mask are compared for the lung only.
      tolerance_mm: of the surface Dice, for "lung" and "infection".
      protocol: by which the cases were chosen; goes into the settings.
      uncertainty: also compares members, which segment each case again.
      metrics: the table of metrics.
      readers: the table of formats.

    Raises:
      InputError: a metric has the name of another column, or a file that was readable before no longer is.
    """
    check_names(metrics)
    model_grid = _ModelGrid(predictor)
    volumes, slices, overlays = [], [], []
    with progress("evaluating", len(cases)) as advance:
        for prepared in cases:
            volume = read_volume(
                prepared.case.ct, readers, assumed=prepared.assumed, physical=predictor.preprocess.is_physical
            )
            probabilities = predictor.scan_probabilities(prepared.images, prepared.boxes, volume.grid)
            model_grid.add(prepared, probabilities)
            comparisons = _comparisons(predictor, prepared, volume, probabilities, tolerance_mm, readers)
            seen = _seen_in(predictor, prepared.case.patient)
            rows = [{**_names(prepared, c.structure), **_row(c, metrics), "seen_in": seen} for c in comparisons]
            dice = math.nan if uncertainty else None
            if uncertainty and predictor.infection is not None:
                _, dice = compare_members(predictor, prepared.images, prepared.boxes, volume.grid)
            rows = [{**row, **_uncertainty(predictor, row, dice)} for row in rows]
            volumes += rows
            slices += [row for comparison in comparisons for row in _slice_rows(prepared, comparison)]
            overlays.append(_overlay(predictor, prepared, volume, comparisons))
            advance(prepared.case.id)
    leaked = sorted({row["patient"] for row in volumes if row["seen_in"]})
    _warn(predictor, leaked, {row["patient"] for row in volumes})
    chosen = {"protocol": protocol, "seen_patients": leaked, "tolerance_mm": dict(tolerance_mm)}
    return Evaluation(
        volumes=volumes,
        slices=slices,
        model_grid=model_grid.rows,
        soft_batch={structure: batches.mean() for structure, batches in model_grid.soft.items()},
        calibration=model_grid.calibration,
        overlays=overlays,
        settings={**chosen, **_settings(predictor)},
        metrics=metrics,
        logits=model_grid.logits,
    )


def _warn(predictor: Predictor, leaked: Sequence[str], patients: Set[str]) -> None:
    """Warns of numbers that are not, or may not be, those of unseen patients, and of those that are left out."""
    if leaked:
        logger.warning(
            "%s: in the training or validation of the models that are evaluated; their numbers are not those of unseen "
            "patients (column seen_in)",
            ", ".join(leaked),
        )
    if not all(model.config.lists_patients for model in predictor.models.values()):
        logger.warning("the models do not list all of their training patients: some of these may be among them")
    record = predictor.record
    calibrated = sorted(patients & set(record.patient_ids if record else ()))
    if calibrated:
        names = ", ".join(calibrated)
        logger.warning("%s: the intervals and the temperature come from these patients, and fit them better", names)
    if record is not None and predictor.interval_record is None:
        logger.warning("no intervals: the models were calibrated with other thresholds or postprocessing")


class _ModelGrid:
    """What is counted on the slices that the models see; see `Evaluation` for the attributes."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.rows: list[dict[str, Any]] = []
        self.soft = {structure: _SoftBatches() for structure in predictor.structures}
        self.calibration: dict[str, Calibration] = {}
        self.logits: dict[str, LogitHistogram] = {}

    def add(self, prepared: PreparedCase, probabilities: Mapping[str, FloatArray]) -> None:
        """A case, with the probabilities of its masks."""
        for structure, probability in probabilities.items():
            if (masks := getattr(prepared, structure)) is None:
                continue
            target = masks[..., 0]
            self.soft[structure].add(probability, target)
            _accumulate(self.calibration, structure, calibration_sums(probability, target))
            mask = probability > self._predictor.threshold(structure)
            counts = {name: int(count) for name, count in confusion_counts(mask, target > 0).items()}
            self.rows.append({**_names(prepared, structure), **hard_metrics(counts), **counts})
            if structure == "infection":
                _accumulate(self.logits, prepared.case.patient, logit_histogram(probability, target))


def _accumulate(sums: dict[str, Any], key: str, value: Any) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _settings(predictor: Predictor) -> dict[str, Any]:
    """How masks, reported probabilities and intervals are made."""
    settings: dict[str, Any] = {
        "threshold": predictor.mask_thresholds,
        "min_component_fraction": predictor.min_component_fraction,
        "infection_postprocess": predictor.infection_postprocess,
    }
    if predictor.record is not None:
        settings["temperature"] = predictor.record.temperature
    if (record := predictor.interval_record) is not None:
        settings["interval"] = {"level": record.level, "guarantee": record.guarantee}
    return settings


def _uncertainty(predictor: Predictor, row: Mapping[str, Any], pairwise_dice: float | None) -> dict[str, float]:
    """What a row has to say of its own error: columns of what was asked for, NaN but for the infection."""
    is_infection, record = row["structure"] == "infection", predictor.interval_record
    columns = {} if pairwise_dice is None else {"pairwise_dice": pairwise_dice if is_infection else math.nan}
    if record is None:
        return columns
    percent = 100 * row["lung_involvement"]
    ml = involvement = (math.nan, math.nan)
    if is_infection and not math.isnan(percent):  # without lung there is nothing to be near to
        ml, involvement = (
            record.interval("infection_ml", row["volume_ml"]),
            record.interval("involvement_percent", percent),
        )
    names = "volume_low_ml", "volume_high_ml", "involvement_low_percent", "involvement_high_percent"
    return {**columns, **dict(zip(names, (*ml, *involvement), strict=True))}


def _seen_in(predictor: Predictor, patient: str) -> str:
    """Where one of the models has seen a patient: "train", "val", or ""."""
    configs = [model.config for model in predictor.models.values()]
    subsets = {"train": [c.train_patients for c in configs], "val": [c.val_patients for c in configs]}
    return next((name for name, groups in subsets.items() if any(patient in group for group in groups)), "")


def _comparisons(
    predictor: Predictor,
    prepared: PreparedCase,
    volume: Volume,
    probabilities: Mapping[str, FloatArray],
    tolerance_mm: Mapping[str, float],
    readers: Mapping[str, Reader],
) -> list[Comparison]:
    """Predicted and reference masks on the native grid, of each structure that both have."""
    case, grid = prepared.case, volume.grid
    if grid.is_sheared:
        logger.warning("%s: its axes are not at right angles (gantry tilt); surface distances are undefined", case.ct)
    native = predictor.to_native_grid(probabilities, prepared.boxes, volume.values.shape[:2])
    predicted = {name: slices.mask for name, slices in native.items()}
    labels = read_mask(case.lung_mask, case.ct, grid, readers)
    reference: dict[str, Array] = {"lung": labels > 0}
    if case.infection_mask is not None:
        reference["infection"] = read_mask(case.infection_mask, case.ct, grid, readers) > 0
    if "lung" in predicted and _has_sides(labels, case.lung_mask):
        predicted |= split_lungs(predicted["lung"], body_columns(prepared.boxes))
        reference |= {"left_lung": labels == LEFT, "right_lung": labels == RIGHT}
    return [
        Comparison(
            structure,
            predicted,
            reference,
            None if grid.is_sheared else grid.spacing_mm,
            grid.voxel_ml,
            tolerance_mm["infection" if structure == "infection" else "lung"],
        )
        for structure in STRUCTURES
        if structure in predicted and structure in reference
    ]


def _has_sides(labels: npt.NDArray[np.uint8], path: Path) -> bool:
    """Whether the labels (rows, columns, slices) of a lung mask are those of the left and the right lung."""
    if set(np.flatnonzero(np.bincount(labels.ravel()))) - {0} != {LEFT, RIGHT}:
        return False
    exchanged = labels_are_exchanged(labels)
    if exchanged:
        logger.warning("%s: label %d (left) lies on the right; the lungs are not compared by side", path, LEFT)
    return not exchanged


def _row(comparison: Comparison, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    volume_ml, reference_ml = comparison.volumes_ml
    lung_involvement, reference_lung_involvement = comparison.lung_involvement
    return {
        **{name: float(metric.value(comparison)) for name, metric in metrics.items()},
        "volume_ml": volume_ml,
        "reference_ml": reference_ml,
        **{name: comparison.counts[name] for name in COUNTS},
        "empty": empty_masks(comparison.counts),
        "lung_involvement": lung_involvement,
        "reference_lung_involvement": reference_lung_involvement,
    }


def _slice_rows(prepared: PreparedCase, comparison: Comparison) -> list[dict[str, Any]]:
    counts = confusion_counts(*comparison.masks, axis=(0, 1))
    return [
        {
            "case": prepared.case.id,
            "structure": comparison.structure,
            "slice": k,
            **{name: int(counts[name][k]) for name in COUNTS},
        }
        for k in range(len(prepared.boxes))
    ]


def _overlay(
    predictor: Predictor, prepared: PreparedCase, volume: Volume, comparisons: Sequence[Comparison]
) -> tuple[float, Overlay]:
    """Dice of the last structure that is drawn, the infection where there is one, and the slice with most of it."""
    drawn = [c for c in comparisons if c.structure in predictor.structures]
    first, last = drawn[0].masks[1], drawn[-1].masks[1]
    shown = next((mask for mask in (last, first) if mask.any()), last)
    k = int(np.argmax(shown.sum(axis=(0, 1))))
    pairs = {c.structure: c.masks for c in drawn}
    return hard_metrics(drawn[-1].counts)["dice"], Overlay(
        f"{prepared.case.id} slice {k}",
        volume.normalize_hu(k),
        {structure: reference[..., k].copy() for structure, (_, reference) in pairs.items()},
        {structure: predicted[..., k].copy() for structure, (predicted, _) in pairs.items()},
    )


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
