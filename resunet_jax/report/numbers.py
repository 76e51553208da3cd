"""The numbers of a segmented scan, as its report.json has them; the schema stands in `measure`."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from resunet_jax import __version__
from resunet_jax.data.volume import FloatArray
from resunet_jax.files import without_nan
from resunet_jax.inference.predictor import Predictor
from resunet_jax.inference.scan import SegmentedScan
from resunet_jax.metrics.lesions import SMALLEST_LESION_ML
from resunet_jax.metrics.lung_sides import LEFT, RIGHT, left_lung, sagittal_plane
from resunet_jax.metrics.severity import component_sizes, grade, involvement_percent, thirds
from resunet_jax.report.markup import DISCLAIMER

SCHEMA_VERSION = 1

CONSOLIDATION_HU = -300.0
"""Infection at or above it counts as consolidation, below as ground glass, unless another value is asked for."""

PLAUSIBLE_LUNG_ML = (500.0, 12_000.0)
"""Volume of both lungs; what lies outside is warned of."""

_BRIGHTEST_LUNG_HU = -250.0  # mean of the lung mask without infection
_BONE_HU = (130.0, 2000.0)  # windows of soft tissue end not far above the first; above the second is metal
_CENTRAL = 0.12  # of the body's width, to either side of its middle
_LEAST_BONE = 20  # voxels a slice: fewer do not show a spine
_OUTER = 0.15  # bone counts behind or in front of all but so much of the lungs: contrast agent lies between them
_END_OF_LUNGS = 5  # one of so many parts of the slices with lung
_EXCHANGED = -0.1  # of `Totals.orientation_score`: 0.58 to 1.3 in nine real scans, -0.1 to 0.72 in forty phantoms
_LEAST_LUNG_ML_PER_CM = 2.0  # of a scan that may be a part of one, as a mean over its slices
_LEAST_OUTSIDE_ML = 1.0  # of infection that lies outside the lung mask, to be told
_LEVELS_HU = np.arange(-1020.0, 300.0, 10.0)  # centres of the bins in which densities are counted
_FAINT_HU = 250.0  # of `Totals.contrast_hu`: up to 240 in a lung dense as a whole, from 270 on in six infected ones
_LOBES_OFF = 1 / 3  # of the volume of the lungs: the difference of that of the lobes, to be told
_LEAST_FAINT_ML = 10.0  # of infection, to be told that it is faint

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Slices:
    """Some slices of a segmented scan, oriented (posterior, left, superior).

    Attributes:
      start: number of the first.
      hu: float32 (rows, columns, slices).
      lung: uint8, 0 background, 1 left, 2 right lung.
      infection: bool.
      uncertainty: uint8, see `uncertainty_map`, or None.
    """

    start: int
    hu: FloatArray
    lung: npt.NDArray[np.uint8]
    infection: Mask
    uncertainty: npt.NDArray[np.uint8] | None = None


def iter_slices(segmented: SegmentedScan) -> Iterator[Slices]:
    """All slices of a scan, a chunk in memory at a time; a structure without a model is empty."""
    plane = sagittal_plane(segmented.profiles["lung"], segmented.body_columns) if "lung" in segmented.packed else 0
    for start, stop in segmented.chunks():
        hu = segmented.hu(start, stop)
        lung, infection = (
            segmented.mask(name, start, stop) if name in segmented.packed else np.zeros(hu.shape, bool)
            for name in ("lung", "infection")
        )
        labels = np.where(left_lung(lung, plane), LEFT, RIGHT * lung).astype(np.uint8)
        yield Slices(start, hu, labels, infection, segmented.uncertainty_map(start, stop))


class Totals:
    """Counts over the slices of a scan, added up a chunk at a time."""

    def __init__(self, segmented: SegmentedScan, consolidation_hu: float = CONSOLIDATION_HU) -> None:
        slices = len(segmented.boxes)
        first, last = segmented.body_columns
        reach = max(1, int(_CENTRAL * (last - first)))
        self._central = slice(max(0, (first + last) // 2 - reach), (first + last) // 2 + reach + 1)
        # By slice: voxels of left and right lung, and of both that are infected; voxels of the infection.
        self.lung = {side: np.zeros(slices, np.int64) for side in ("left", "right")}
        self.infected = {side: np.zeros(slices, np.int64) for side in ("left", "right")}
        self.infection = np.zeros(slices, np.int64)
        self.consolidation_hu = consolidation_hu  # from which infection counts as consolidation
        self.consolidation = 0
        self.infection_hu = 0.0
        # By level of density: voxels of both lungs that are infected, and that are not.
        self.levels = {name: np.zeros(len(_LEVELS_HU), np.int64) for name in ("infected", "healthy")}
        self.healthy_hu = 0.0
        # By row: voxels of both lungs and of bone near the middle. By slice: the lungs' sum of row numbers.
        rows = segmented.scan.grid.oriented_shape[0]
        self.by_row = {name: np.zeros(rows, np.int64) for name in ("lung", "bone")}
        self.lung_rows = np.zeros(slices)
        self.lobes: dict[int, npt.NDArray[np.int64]] = {}  # by label: voxels of the lobe, and of those infected

    def add(self, slices: Slices, lobes: npt.NDArray[np.uint8] | None = None) -> None:
        """Counts some slices; `lobes` are their labels, (rows, columns, slices), where lobes are known."""
        some = slice(slices.start, slices.start + slices.hu.shape[-1])
        infection, lung = slices.infection, slices.lung > 0
        for side, label in (("left", LEFT), ("right", RIGHT)):
            mask = slices.lung == label
            self.lung[side][some] = np.count_nonzero(mask, axis=(0, 1))
            self.infected[side][some] = np.count_nonzero(mask & infection, axis=(0, 1))
        self.infection[some] = np.count_nonzero(infection, axis=(0, 1))
        values = slices.hu[infection]
        self.consolidation += int(np.count_nonzero(values >= self.consolidation_hu))
        self.infection_hu += float(values.sum(dtype=np.float64))
        healthy = slices.hu[lung & ~infection]
        self.healthy_hu += float(healthy.sum(dtype=np.float64))
        self.levels["healthy"] += _count_levels(healthy)
        self.levels["infected"] += _count_levels(slices.hu[lung & infection])
        for label in [] if lobes is None else np.unique(lobes[lobes > 0]):
            lobe = lobes == label
            counts = np.array([np.count_nonzero(lobe), np.count_nonzero(lobe & infection)])
            self.lobes[int(label)] = self.lobes.get(int(label), 0) + counts
        central = slices.hu[:, self._central]
        low, high = _BONE_HU
        for name, mask in (("lung", lung), ("bone", (central > low) & (central < high))):
            self.by_row[name] += np.count_nonzero(mask, axis=(1, 2))
        self.lung_rows[some] = np.arange(len(lung)) @ np.count_nonzero(lung, axis=1)

    @property
    def orientation_score(self) -> float:
        """How much speaks for front and back being as the header says: above 0; below, they are exchanged.

        The sum of two signs. Near the middle of the body more bone lies behind the lungs, the spine, than in front of
        them, the breastbone: the difference as a fraction of both, 0 where a window cuts bone off. And the lowest and
        the highest parts of the lungs lie at the back: their mean distance from the centroid of the lungs, in standard
        deviations of the lungs' rows.
        """
        lung, bone, row = self.by_row["lung"], self.by_row["bone"], np.arange(len(self.by_row["lung"]))
        with_lung = np.flatnonzero(self.lung_voxels)
        if not len(with_lung):
            return 0.0
        share = np.cumsum(lung) / lung.sum()
        behind, in_front = int(bone[share > 1 - _OUTER].sum()), int(bone[share < _OUTER].sum())
        count = behind + in_front
        spine = (behind - in_front) / count if count > _LEAST_BONE * len(self.infection) else 0.0
        fifth = -(-len(with_lung) // _END_OF_LUNGS)
        ends = [
            self.lung_rows[some].sum() / self.lung_voxels[some].sum()
            for some in (with_lung[:fifth], with_lung[-fifth:])
        ]
        centroid = lung @ row / lung.sum()
        spread = math.sqrt(lung @ (row - centroid) ** 2 / lung.sum())
        return float(spine + (np.mean(ends) - centroid) / max(spread, 1.0))

    @property
    def contrast_hu(self) -> float:
        """By how much the infection of the lungs is denser than aerated lung.

        Its median less the lower quartile of what is not infected, each to 10 HU; NaN where there is none of either.
        """
        infected, healthy = self.levels["infected"], self.levels["healthy"]
        return _quantile_hu(infected, 0.5) - _quantile_hu(healthy, 0.25)

    @property
    def lung_voxels(self) -> npt.NDArray[np.int64]:
        """Of both lungs, in each slice."""
        return self.lung["left"] + self.lung["right"]

    @property
    def infected_voxels(self) -> npt.NDArray[np.int64]:
        """Infection within both lungs, in each slice."""
        return self.infected["left"] + self.infected["right"]


def _count_levels(hu: FloatArray) -> npt.NDArray[np.int64]:
    bins = np.rint((hu - _LEVELS_HU[0]) / (_LEVELS_HU[1] - _LEVELS_HU[0]))
    return np.bincount(bins.clip(0, len(_LEVELS_HU) - 1).astype(np.int64), minlength=len(_LEVELS_HU))


def _quantile_hu(counts: npt.NDArray[np.int64], q: float) -> float:
    return float(_LEVELS_HU[np.searchsorted(counts.cumsum(), q * counts.sum())]) if counts.any() else math.nan


def measure(segmented: SegmentedScan, totals: Totals, scan: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """All numbers of a scan that both models have segmented.

    `totals` are over all of its slices; `scan` is what is known of its file: "name", "file", "format".

    Returns:
      for report.json; undefined numbers are None:
        "schema_version", "version", "disclaimer", "seconds";
        "scan": "name", "file", "format", "shape" and "spacing_mm" (rows, columns, slices of the oriented volume),
          "slices";
        "lung": "volume_ml", "left_ml", "right_ml";
        "infection": "volume_ml", "involvement_percent" (infected fraction of the lung mask), "ground_glass_ml" and
          "consolidation_ml" (below, and from "consolidation_above_hu"), "mean_hu", "lesions" and "lesion_volumes_ml"
          (connected components of at least 0.1 ml, largest first), "volume_interval_ml" and
          "involvement_interval_percent" ([low, high] of what the reference may be, see "uncertainty.interval"; None
          without lung);
        "grade": of both lungs, see `grade`;
        "involvement": of "both" lungs, "left", "right", "upper", "middle", "lower" third: "percent", "grade",
          "lung_ml", "infection_ml" (within the lung mask);
        "by_slice": "lung_ml", "infection_ml", from the lowest slice to the highest;
        "lobes": None, or by label as "involvement", but "infection_ml" within the lobe; and "score", the sum of the
          grades: for five lobes the CT severity score, 0 to 25;
        "uncertainty": "interval": None, or "level", "guarantee" (how often a new patient is covered at least, where
          patients come alike; None where nothing is sure), "method", "patients" (that it is made from), see
          `UncertaintyRecord`; "temperature" of the infection's reported probability and "probability_threshold", above
          which it lies in the mask; "members" and "pairwise_dice" (mean Dice of their masks, low where the mask is
          doubtful, see `compare_members`), None where they were not asked for;
        "warnings": what makes the masks doubtful; "notes": what to know about the numbers;
        "models": by structure, "fingerprint" and "threshold"; "settings": what else decides the masks.
    """
    grid, ml = segmented.scan.grid, segmented.scan.grid.voxel_ml
    percent = involvement_percent(int(totals.infected_voxels.sum()), int(totals.lung_voxels.sum()))
    infection = int(totals.infection.sum())
    volume = infection * ml if totals.lung_voxels.any() else math.nan  # without lung there is nothing to be near to
    intervals = _intervals(segmented.predictor, {"infection_ml": volume, "involvement_percent": percent})
    report = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "disclaimer": DISCLAIMER,
        "seconds": round(seconds, 2),
        "scan": {
            **scan,
            "shape": list(grid.oriented_shape),
            "spacing_mm": list(grid.spacing_mm),
            "slices": grid.oriented_shape[-1],
        },
        "lung": {
            "volume_ml": float(totals.lung_voxels.sum() * ml),
            **{f"{side}_ml": float(totals.lung[side].sum() * ml) for side in ("left", "right")},
        },
        "infection": {
            "volume_ml": infection * ml,
            "involvement_percent": percent,
            "ground_glass_ml": (infection - totals.consolidation) * ml,
            "consolidation_ml": totals.consolidation * ml,
            "consolidation_above_hu": totals.consolidation_hu,
            "mean_hu": totals.infection_hu / infection if infection else None,
            **_lesions(segmented, ml),
            "volume_interval_ml": intervals["infection_ml"],
            "involvement_interval_percent": intervals["involvement_percent"],
        },
        "grade": grade(percent),
        "involvement": _involvement(totals, ml),
        "by_slice": {"lung_ml": (totals.lung_voxels * ml).tolist(), "infection_ml": (totals.infection * ml).tolist()},
        "lobes": _lobes(totals, ml),
        "uncertainty": _uncertainty(segmented),
        "warnings": warnings_of(segmented, totals),
        "notes": _notes(segmented, totals),
        "models": _models(segmented),
        "settings": _settings(segmented),
    }
    return without_nan(report)


def warnings_of(segmented: SegmentedScan, totals: Totals) -> list[str]:
    """All that makes the masks of a scan doubtful; without a lung model, only what its header does."""
    grid, warnings = segmented.scan.grid, list(segmented.scan.warnings)
    if "lung" not in segmented.packed:
        return warnings
    warnings += implausible(totals, grid.voxel_ml, grid.slice_distance_mm)
    lobes, lung = sum(int(lobe) for lobe, _ in totals.lobes.values()), int(totals.lung_voxels.sum())
    if totals.lobes and abs(lobes - lung) > _LOBES_OFF * lung:
        warnings.append(
            f"the lobes measure {lobes * grid.voxel_ml:.0f} ml, the lungs {lung * grid.voxel_ml:.0f} ml; "
            "check the mask of the lobes"
        )
    if totals.orientation_score < _EXCHANGED:
        warnings.append("front and back seem to be exchanged in the header, and the masks are worse for it; correct it")
    return warnings


def implausible(totals: Totals, voxel_ml: float, slice_mm: float) -> list[str]:
    """What of the counts makes the masks of a scan doubtful; `slice_mm` is the distance of its slices."""
    lung, infection = int(totals.lung_voxels.sum()), int(totals.infection.sum())
    if lung == 0:
        return ["no lung was found; is it a chest CT, and are front and back, left and right as the header says?"]
    warnings = []
    low, high = PLAUSIBLE_LUNG_ML
    is_whole = totals.lung_voxels[0] == totals.lung_voxels[-1] == 0
    least = low if is_whole else _LEAST_LUNG_ML_PER_CM * len(totals.lung_voxels) * slice_mm / 10
    if not least <= lung * voxel_ml <= high:
        warnings.append(
            f"the lungs measure {lung * voxel_ml:.0f} ml, where {least:.0f} to {high:.0f} ml are plausible; check the "
            "masks, and the spacing in the header"
        )
    healthy = lung - int(totals.infected_voxels.sum())
    if healthy and totals.healthy_hu / healthy > _BRIGHTEST_LUNG_HU:
        warnings.append(
            f"the lung mask has a mean of {totals.healthy_hu / healthy:.0f} HU, which is denser than lung; check the "
            "masks"
        )
    outside = infection - int(totals.infected_voxels.sum())
    if outside > infection / 2 and outside * voxel_ml >= _LEAST_OUTSIDE_ML:
        warnings.append(f"{100 * outside / infection:.0f} % of the infection lies outside the lung mask; check both")
    if (infection - outside) * voxel_ml >= _LEAST_FAINT_ML and totals.contrast_hu < _FAINT_HU:
        warnings.append(
            f"the infection is faint ({totals.contrast_hu:+.0f} HU against aerated lung); lungs that are denser as a "
            "whole, as in expiration, look like this: check it"
        )
    return warnings


def _lesions(segmented: SegmentedScan, voxel_ml: float) -> dict[str, Any]:
    masks = (
        segmented.mask("infection", start, stop)[..., k]
        for start, stop in segmented.chunks()
        for k in range(stop - start)
    )
    volumes = [float(size * voxel_ml) for size in component_sizes(masks) if size * voxel_ml >= SMALLEST_LESION_ML]
    return {"lesions": len(volumes), "lesion_volumes_ml": [round(volume, 3) for volume in volumes]}


def _involvement(totals: Totals, voxel_ml: float) -> dict[str, Any]:
    """Of each lung, and of the thirds of both by height."""
    pairs = {"both": (totals.lung_voxels, totals.infected_voxels)}
    pairs |= {side: (totals.lung[side], totals.infected[side]) for side in ("left", "right")}
    for name, (start, stop) in thirds(totals.lung_voxels).items():
        pairs[name] = totals.lung_voxels[start:stop], totals.infected_voxels[start:stop]
    return {name: _region(int(lung.sum()), int(bad.sum()), voxel_ml) for name, (lung, bad) in pairs.items()}


def _lobes(totals: Totals, voxel_ml: float) -> dict[str, Any] | None:
    if not totals.lobes:
        return None
    regions = {str(k): _region(int(lobe), int(bad), voxel_ml) for k, (lobe, bad) in sorted(totals.lobes.items())}
    return {**regions, "score": sum(region["grade"] for region in regions.values())}


def _region(lung_voxels: int, infected_voxels: int, voxel_ml: float) -> dict[str, Any]:
    """Involvement of a region of the lungs: "percent", "grade", "lung_ml", "infection_ml"."""
    percent = involvement_percent(infected_voxels, lung_voxels)
    return {
        "percent": percent,
        "grade": grade(percent),
        "lung_ml": lung_voxels * voxel_ml,
        "infection_ml": infected_voxels * voxel_ml,
    }


def _notes(segmented: SegmentedScan, totals: Totals) -> list[str]:
    notes = []
    if not segmented.scan.warnings:
        notes.append("Left and right follow the header of the scan, and so do front and back.")
    lung = [k for k, packed in enumerate(segmented.packed["lung"]) if packed.any()]
    ends = {0, len(segmented.boxes) - 1}
    if lung and ends & {lung[0], lung[-1]}:
        notes.append(
            "The lungs reach the end of the scan, so their volume may be that of a part; intervals are for whole scans."
        )
    if segmented.scan.intensity_scale == "windowed" and segmented.scan.stored_window is None:
        shift = f", shifted by {1500 * segmented.offset:+.0f} HU to air at -1000 HU" if segmented.offset else ""
        notes.append(
            f"Stored in 0..255 without its window: HU [-1250, 250] is assumed{shift}, and what is denser is cut off."
        )
    outside = int(totals.infection.sum() - totals.infected_voxels.sum()) * segmented.scan.grid.voxel_ml
    if outside >= _LEAST_OUTSIDE_ML:
        notes.append(
            f"{outside:.0f} ml of the infection lie outside the lung mask: they count in its volume, but not in the "
            "involvement or the volume of the lungs."
        )
    return [*notes, *segmented.scan.notes, *_interval_note(segmented.predictor)]


def _intervals(predictor: Predictor, values: Mapping[str, float]) -> dict[str, list[float] | None]:
    record = predictor.interval_record
    return {
        name: None if record is None or math.isnan(value) else list(record.interval(name, value))
        for name, value in values.items()
    }


def _interval_note(predictor: Predictor) -> list[str]:
    """One line on what the intervals are worth, or why there are none."""
    record = predictor.interval_record
    if predictor.record is None:
        return ["No interval, and probabilities as the model gives them: these models were not calibrated."]
    if record is None:
        return ["No interval: the models were calibrated with other thresholds or postprocessing."]
    alike = f"{100 * record.level:.0f} % of patients like those on average, not for another scanner or another disease"
    if record.guarantee is not None:
        return [f"Intervals from the errors on {record.patients} held-out patients; each is right for {alike}."]
    return [
        f"Intervals are an estimate without a guarantee, by the errors of the models of a cross-validation on "
        f"{record.patients} patients, whom this model may have seen; each is meant for {alike}."
    ]


def _uncertainty(segmented: SegmentedScan) -> dict[str, Any]:
    predictor, agreed = segmented.predictor, segmented.uncertainty
    record = predictor.interval_record
    interval = record and {name: getattr(record, name) for name in ("level", "guarantee", "method", "patients")}
    return {
        "interval": interval,
        "temperature": None if predictor.record is None else predictor.record.temperature,
        "probability_threshold": predictor.reported_threshold("infection"),
        "members": None if agreed is None else agreed.members,
        "pairwise_dice": None if agreed is None else agreed.pairwise_dice,
    }


def _models(segmented: SegmentedScan) -> dict[str, Any]:
    predictor = segmented.predictor
    thresholds = predictor.mask_thresholds
    return {n: {"fingerprint": digest, "threshold": thresholds[n]} for n, digest in predictor.fingerprints.items()}


def _settings(segmented: SegmentedScan) -> dict[str, Any]:
    predictor, scan = segmented.predictor, segmented.scan
    return {
        **predictor.infection_postprocess,
        "min_component_fraction": predictor.min_component_fraction,
        "image_size": predictor.preprocess.image_size,
        "context_mm": predictor.preprocess.context_mm,
        "intensity_scale": scan.intensity_scale if scan.stored_window is None else list(scan.stored_window),
        "air_offset_hu": round(1500 * segmented.offset, 1),
    }


def summary_line(report: Mapping[str, Any]) -> str:
    """One line for a terminal."""
    lung, infection, percent = report["lung"], report["infection"], report["infection"]["involvement_percent"]
    return ", ".join(
        [
            f"{lung['volume_ml'] / 1000:.2f} l lung",
            f"{'–' if percent is None else f'{percent:.1f}' if percent >= 0.1 else f'{percent:.2g}'} % involved",
            f"{infection['volume_ml']:.0f} ml" if infection["volume_ml"] >= 1 else f"{infection['volume_ml']:.2g} ml",
            f"grade {'–' if report['grade'] is None else report['grade']}",
            f"{report['seconds']:.0f} s",
        ]
    )
