"""What a pair of models gets wrong on held-out patients: its temperature, the residuals of its intervals.

Two ways to such patients. Those of a split, segmented by the pair itself (`held_out_errors`): intervals are
split conformal. Those of a finished cross-validation, each segmented by the models that have not seen it
(`fold_errors`): for a final pair trained on all of them these residuals are an estimate, and for a new scan that all
fold models segment they make a CV+ interval (`cv_plus_coverage`).
"""

import dataclasses
import functools
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resunet_jax.config import differences, from_dict
from resunet_jax.data.cases import find_cases
from resunet_jax.data.splits import read_split
from resunet_jax.errors import InputError, first_line
from resunet_jax.evaluation.evaluate import evaluate
from resunet_jax.files import read_json
from resunet_jax.inference.predictor import Predictor
from resunet_jax.metrics import METRICS
from resunet_jax.metrics.calibration import LogitHistogram, fit_temperature
from resunet_jax.metrics.conformal import (
    QUANTITIES,
    conformal_quantile,
    cv_plus_guarantee,
    cv_plus_interval,
    default_level,
    is_covered,
    rank_correlation,
    worst_third_found,
)
from resunet_jax.model.build import adds_lesions, averaging_of
from resunet_jax.plugins import Tables
from resunet_jax.progress import logger
from resunet_jax.weights.store import CONFIG_FILE
from resunet_jax.weights.uncertainty import Method, UncertaintyRecord

_LEAST_PATIENTS = 2


class ScanErrors(NamedTuple):
    """What models make of a scan with references.

    Attributes:
      case: its id.
      patient: whose it is.
      fold: of the models, 0 where there is one pair.
      dice: of the infection, NaN where undefined.
      pairwise_dice: of members, see `compare_members`.
      predicted: of each of `QUANTITIES`, NaN where undefined.
      reference: the same in truth.
    """

    case: str
    patient: str
    fold: int
    dice: float
    pairwise_dice: float
    predicted: dict[str, float]
    reference: dict[str, float]

    def residual(self, name: str) -> float:
        """The error on the scale of the quantity; NaN where it is undefined."""
        values = self.predicted[name], self.reference[name]
        return math.nan if any(map(math.isnan, values)) else QUANTITIES[name].residual(*values)


@dataclasses.dataclass(frozen=True)
class HeldOutErrors:
    """Of scans that the models have not seen.

    Attributes:
      scans: one row each.
      logits: see `Evaluation`, by patient.
    """

    scans: list[ScanErrors]
    logits: dict[str, LogitHistogram]

    def patient_residuals(self, name: str) -> dict[str, float]:
        """The largest residual of each patient's scans, where one is defined."""
        residuals: dict[str, float] = {}
        for scan in self.scans:
            if not math.isnan(residual := scan.residual(name)):
                residuals[scan.patient] = max(residual, residuals.get(scan.patient, 0.0))
        return residuals


Evaluator = Callable[..., HeldOutErrors]
"""`held_out_errors` of a data set, to which the models are given."""


def held_out_errors(
    data_dir: Path, cache_dir: Path, *, tables: Tables, fold: int = 0, uncertainty: bool = True, **options: Any
) -> HeldOutErrors:
    """How models segment the test cases of a split, by the readers and architectures of `tables`.

    For `fold` see `ScanErrors`, for all else `evaluate`.

    Raises:
      InputError: see `evaluate`; or one of the patients trained a model, or chose its epoch.
    """
    metrics = {"dice": METRICS["dice"]}
    evaluation = evaluate(
        data_dir, cache_dir, uncertainty=uncertainty, **{**tables.for_evaluation, "metrics": metrics}, **options
    )
    if seen := evaluation.settings["seen_patients"]:
        raise InputError(
            f"{', '.join(seen)}: in the training or validation of the models; calibrate on patients who are not: "
            "test cases of a split file, or of a study whose folds keep patients together (patient_five_fold)"
        )
    scans = [_scan_errors(row, fold) for row in evaluation.volumes if row["structure"] == "infection"]
    return HeldOutErrors(scans, evaluation.logits)


def _scan_errors(row: Mapping[str, Any], fold: int) -> ScanErrors:
    predicted = {"infection_ml": row["volume_ml"], "involvement_percent": 100 * row["lung_involvement"]}
    reference = {"infection_ml": row["reference_ml"], "involvement_percent": 100 * row["reference_lung_involvement"]}
    dice = row.get("pairwise_dice", math.nan)
    return ScanErrors(row["case"], row["patient"], fold, row["dice"], dice, predicted, reference)


class Fold(NamedTuple):
    """A pair of models of a study, and the cases that tested it."""

    lung: Path
    infection: Path
    test: tuple[str, ...]


def study_folds(study_dir: Path, variant: str | None = None, seed: int | None = None) -> list[Fold]:
    """The pairs of a study by `cross_validate` or `ablate`, from its runs.jsonl; of several variants or seeds, of one.

    Raises:
      InputError: it is no study, has no such pair, lacks folds, has several variants or seeds, or tested a case twice.
    """
    file = study_dir / "runs.jsonl"
    try:
        runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        runs = [run for run in runs if "infection" in run["folders"]]
        there = sorted({(run["variant"], run["seed"]) for run in runs})
        runs = [run for run in runs if variant in (None, run["variant"]) and seed in (None, run["seed"])]
        runs.sort(key=lambda run: (run["split"]["protocol"], run["folders"]["infection"]))
        found = [
            Fold(
                study_dir / run["folders"]["lung"], study_dir / run["folders"]["infection"], tuple(run["split"]["test"])
            )
            for run in runs
        ]
        kinds = sorted({(run["variant"], run["seed"]) for run in runs})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no study ({first_line(error)}); run cross_validate or ablate") from error
    if not found:
        raise InputError(f"{file}: no such pair of models in it; there are {_names(there)}: choose `variant`, `seed`")
    if len(kinds) > 1:
        raise InputError(f"{file}: runs of {_names(kinds)}; choose one with `variant` and `seed`")
    if left := _missing_folds(run["split"]["protocol"] for run in runs):
        raise InputError(f"{study_dir}: fold {', '.join(map(str, sorted(left)))} is not tested; run its command again")
    tested_by: dict[str, str] = {}
    for run in runs:
        folder = run["folders"]["infection"]
        for case in run["split"]["test"]:
            if case in tested_by:
                raise InputError(
                    f"{file}: {case} is tested by two runs, {tested_by[case]} and {folder}; a study is needed whose "
                    "runs have the same settings and test each case once, as by patient_five_fold"
                )
            tested_by[case] = folder
    return found


def _names(kinds: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} with seed {number}" for name, number in kinds) or "none"


def _missing_folds(protocols: Iterable[str]) -> set[int]:
    """The folds of a protocol that are not among these, by what `make_split` calls them."""
    named = [match for text in protocols if (match := re.search(r"fold (\d+) of (\d+)", text))]
    return {fold for match in named for fold in range(int(match[2]))} - {int(match[1]) for match in named}


def check_of_no_fold(folds: Sequence[Fold], split_file: Path | None, data_dir: Path, tables: Tables) -> None:
    """Checks, before long work, that CV+ intervals are not tried on patients that they are made from.

    Raises:
      InputError: a test case of the split is of a patient whom a fold has tested; or see `read_split`.
    """
    if split_file is None:
        return
    cases = find_cases(data_dir, tables.readers)
    tried = {case.patient for case in read_split(split_file, cases).cases("test", cases)}
    tested = {case_id for fold in folds for case_id in fold.test}
    if both := sorted(tried & {case.patient for case in cases if case.id in tested}):
        raise InputError(
            f"{split_file}: {', '.join(both)}: tested by a fold, so the intervals are made from them; its test cases "
            "must be of other patients"
        )


def fold_errors(evaluator: Evaluator, folds: Sequence[Fold], target: Predictor) -> HeldOutErrors:
    """Each test case of a study by the models that have not seen it, with the masks made as `target` makes them.

    Raises:
      InputError: see `held_out_errors`.
    """
    _warn_of_other_models(folds, target)
    scans: list[ScanErrors] = []
    logits: dict[str, LogitHistogram] = {}
    for number, fold in enumerate(folds):
        errors = evaluator(fold=number, **_models(fold, target))
        scans += errors.scans
        for patient, histogram in errors.logits.items():
            logits[patient] = logits[patient] + histogram if patient in logits else histogram
    return HeldOutErrors(scans, logits)


def _warn_of_other_models(folds: Sequence[Fold], target: Predictor) -> None:
    """Where the models of the folds are not made as the target's are: their errors may be others."""
    folders = [
        (name, folder) for fold in folds for name, folder in (("lung", fold.lung), ("infection", fold.infection))
    ]
    for structure, folder in dict.fromkeys(folders):
        file = folder / CONFIG_FILE
        config = from_dict(read_json(file, "run the study again"), str(file))
        paths = differences(config, target.models[structure].config)
        if other := [path for path in paths if path.partition(".")[0] in ("preprocess", "model", "cascade")]:
            logger.warning("%s: other than the %s model that is calibrated in %s", file, structure, ", ".join(other))
        if structure == "infection" and adds_lesions(target.models[structure].config) and not any(averaging_of(config)):
            raise InputError(
                f"{file}: this model has one view of a slice, so it cannot add lesions as the calibrated one does; set "
                "`infected_scan_ml` to 0, or make the study by its recipe"
            )


def _models(fold: Fold, target: Predictor) -> dict[str, Any]:
    settings = target.mask_settings
    settings["infection_postprocess"] = {"infected_scan_ml": 0.0, **settings["infection_postprocess"]}
    return {"lung_checkpoint": fold.lung, "infection_checkpoint": fold.infection, **settings}


def require_pair(target: Predictor) -> None:
    """Checks that there are models of both structures.

    Raises:
      InputError: there is only one.
    """
    if len(target.models) < 2:
        raise InputError("a pair is calibrated: give `lung_checkpoint` and `infection_checkpoint`, or neither")


def make_record(errors: HeldOutErrors, target: Predictor, method: Method, source: str) -> UncertaintyRecord:
    """What is kept with the infection model of `target`.

    Raises:
      InputError: there are too few patients, or only one model.
    """
    require_pair(target)
    residuals = {name: sorted(errors.patient_residuals(name).values()) for name in QUANTITIES}
    least = min(sum(one.has_both for one in errors.logits.values()), *map(len, residuals.values()))
    if least < _LEAST_PATIENTS:
        raise InputError(
            f"{least} patient(s) in whom the models find lungs and some of the infection; at least {_LEAST_PATIENTS} "
            "are needed: add patients with infection, or train longer"
        )
    if method == "split_conformal" and not all(one.config.lists_patients for one in target.models.values()):
        logger.warning("the models do not list their training patients: intervals hold only if none of these is one")
    return UncertaintyRecord(
        fingerprints=target.fingerprints,
        temperature=fit_temperature(list(errors.logits.values())),
        calibration=calibration_of_unseen(errors.logits),
        method=method,
        residuals=residuals,
        settings=target.mask_settings,
        source=source,
        patient_ids=tuple(sorted(errors.patient_residuals("infection_ml"))),
    )


def calibration_of_unseen(logits: Mapping[str, LogitHistogram]) -> dict[str, float]:
    """ECE and Brier score over all patients' pixels, each patient with the temperature of the others.

    Returns:
      "ece", "brier", "ece_calibrated", "brier_calibrated"; "patient_ece", "patient_ece_calibrated", the mean over
      patients; "lowest_temperature", "highest_temperature"; "patients", those with pixels inside and outside.
    """
    logits = {patient: one for patient, one in logits.items() if one.has_both}
    temperatures = {
        patient: fit_temperature([one for other, one in logits.items() if other != patient]) for patient in logits
    }
    own_before = [one.calibration() for one in logits.values()]
    own_after = [one.calibration(temperatures[patient]) for patient, one in logits.items()]
    before, after = (functools.reduce(operator.add, own) for own in (own_before, own_after))
    return {
        "ece": before.ece,
        "ece_calibrated": after.ece,
        "brier": before.brier,
        "brier_calibrated": after.brier,
        "lowest_temperature": min(temperatures.values()),
        "highest_temperature": max(temperatures.values()),
        "patient_ece": float(np.mean([one.ece for one in own_before])),
        "patient_ece_calibrated": float(np.mean([one.ece for one in own_after])),
        "patients": len(logits),
    }


def failure_detection(scans: Sequence[ScanErrors]) -> dict[str, float]:
    """Whether members name the bad masks: "spearman", "worst_third_found", and of how many "scans"."""
    known = [scan for scan in scans if not math.isnan(scan.dice) and not math.isnan(scan.pairwise_dice)]
    score, dice = [scan.pairwise_dice for scan in known], [scan.dice for scan in known]
    return {
        "spearman": rank_correlation(score, dice),
        "worst_third_found": worst_third_found(score, dice),
        "scans": len(known),
    }


def coverage_of_unseen(errors: HeldOutErrors) -> dict[str, dict[str, float]]:
    """How many patients the others' residuals cover, by quantity: "covered" of "patients" at "level".

    A patient is covered where all of its scans are. The level is what one patient fewer can promise.
    """
    results = {}
    for name in QUANTITIES:
        residuals = errors.patient_residuals(name)
        level = default_level(len(residuals) - 1)
        covered = sum(
            one <= conformal_quantile([r for other, r in residuals.items() if other != patient], level)
            for patient, one in residuals.items()
        )
        results[name] = {"level": level, "covered": covered, "patients": len(residuals)}
    return results


def cv_plus_coverage(
    evaluator: Evaluator, folds: Sequence[Fold], errors: HeldOutErrors, target: Predictor, split_file: Path
) -> dict[str, Any]:
    """CV+ intervals of scans that no fold has seen, the test cases of a split, by all fold models and their residuals.

    Returns:
      by quantity "level", "guarantee", "covered", "scans", "width" (median difference of the ends' square roots).
    """
    unseen = [
        evaluator(fold=number, uncertainty=False, split_file=split_file, **_models(fold, target)).scans
        for number, fold in enumerate(folds)
    ]
    fold_of = {scan.patient: scan.fold for scan in errors.scans}
    results = {}
    for name, quantity in QUANTITIES.items():
        residuals = errors.patient_residuals(name)
        level = default_level(len(residuals))
        covered, widths = [], []
        for scans in zip(*unseen, strict=True):
            predicted = [scans[fold_of[patient]].predicted[name] for patient in residuals]
            if any(map(math.isnan, (*predicted, scans[0].reference[name]))):
                continue
            interval = low, high = cv_plus_interval(predicted, list(residuals.values()), level, quantity)
            covered.append(is_covered(interval, scans[0].reference[name]))
            widths.append(math.sqrt(high) - math.sqrt(low))
        results[name] = {
            "level": level,
            "guarantee": cv_plus_guarantee(level, len(residuals), len(folds)),
            "covered": sum(covered),
            "scans": len(covered),
            "width": float(np.median(widths)) if widths else math.nan,
        }
    return results


def summarize_errors(errors: HeldOutErrors) -> dict[str, Any]:
    """The tables: "calibration", "failure_detection", "coverage", and "scans", a row each."""
    return {
        "calibration": calibration_of_unseen(errors.logits),
        "failure_detection": failure_detection(errors.scans),
        "coverage": coverage_of_unseen(errors),
        "scans": [
            {**scan._asdict(), "residuals": {name: scan.residual(name) for name in QUANTITIES}} for scan in errors.scans
        ],
    }


def _defined(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def to_markdown(summary: Mapping[str, Any], record: UncertaintyRecord) -> str:
    """The same as Markdown."""
    calibration, failure = summary["calibration"], summary["failure_detection"]
    lines = [
        f"{record.source}. Each patient is evaluated with what the others gave.",
        "",
        f"| temperature {record.temperature:.2f} (without one patient {calibration['lowest_temperature']:.2f} to "
        f"{calibration['highest_temperature']:.2f}) | ECE | Brier | ECE of a patient, mean |",
        "| --- | --- | --- | --- |",
        f"| without | {calibration['ece']:.4f} | {calibration['brier']:.4f} | {calibration['patient_ece']:.4f} |",
        f"| with | {calibration['ece_calibrated']:.4f} | {calibration['brier_calibrated']:.4f} | "
        f"{calibration['patient_ece_calibrated']:.4f} |",
        "",
        "| agreement of members | value |",
        "| --- | --- |",
        f"| Spearman with Dice, {failure['scans']} scans | {_defined(failure['spearman'], '.2f')} |",
        f"| found of the worst third | {_defined(failure['worst_third_found'], '.0%')} |",
        "",
        "| interval of | level | covered | ± on the square root |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in summary["coverage"].items():
        reach = conformal_quantile(record.residuals[name], record.level)
        covered = f"{values['covered']} of {values['patients']} patients"
        lines.append(f"| {name} | {values['level']:.2f} | {covered} | {reach:.2f} at {record.level:.2f} |")
    for name, values in summary.get("cv_plus", {}).items():
        level = f"{values['level']:.2f}, guaranteed {values['guarantee']:.2f}"
        covered = f"{values['covered']} of {values['scans']} scans of no fold"
        lines.append(f"| {name}, CV+ | {level} | {covered} | {_defined(values['width'], '.2f')} from end to end |")
    return "\n".join(lines) + "\n"
