"""Residuals, temperatures and tables in closed form; and the script, from split and from folds to a report."""

import csv
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from resunet_jax import Predictor, load_predictor
from resunet_jax.config import Config, override, to_dict
from resunet_jax.data.cases import find_cases
from resunet_jax.errors import InputError
from resunet_jax.evaluation.evaluate import evaluate
from resunet_jax.files import write_json
from resunet_jax.metrics.calibration import LogitHistogram, fit_temperature, logit_histogram
from resunet_jax.metrics.conformal import QUANTITIES, is_covered, split_interval
from resunet_jax.plugins import Tables
from resunet_jax.studies import calibrate as module
from resunet_jax.studies.calibrate import (
    Evaluator,
    Fold,
    HeldOutErrors,
    ScanErrors,
    calibration_of_unseen,
    check_of_no_fold,
    coverage_of_unseen,
    cv_plus_coverage,
    failure_detection,
    fold_errors,
    held_out_errors,
    make_record,
    require_pair,
    study_folds,
    summarize_errors,
    to_markdown,
)
from resunet_jax.weights.uncertainty import UNCERTAINTY_FILE, load_record
from tests.conftest import Trained, run_script


def scan(
    patient: str, predicted: float, reference: float, *, dice: float = 0.5, agreement: float = 0.5, fold: int = 0
) -> ScanErrors:
    values = ({"infection_ml": ml, "involvement_percent": ml / 10} for ml in (predicted, reference))
    return ScanErrors(f"{patient}_{predicted:g}", patient, fold, dice, agreement, *values)


def histogram(temperature: float, seed: int) -> LogitHistogram:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 4, 20_000)
    target = rng.random(logits.size) < 1 / (1 + np.exp(-logits / temperature))
    return logit_histogram((1 / (1 + np.exp(-logits))).astype(np.float32), target.astype(np.uint8))


SCANS = [scan("a", 100, 81), scan("a", 16, 36), scan("b", 25, 25), scan("c", 4, 121), scan("d", 9, 16)]
ERRORS = HeldOutErrors(SCANS, {name: histogram(2.0, k) for k, name in enumerate("abcd")})


def test_a_patient_has_the_residual_of_its_worst_scan() -> None:
    assert ERRORS.patient_residuals("infection_ml") == pytest.approx({"a": 2, "b": 0, "c": 9, "d": 1})
    undefined = scan("e", math.nan, 3)
    assert "e" not in HeldOutErrors([*SCANS, undefined], {}).patient_residuals("infection_ml")


def test_patients_are_evaluated_with_the_others() -> None:
    """Of four, three others promise 3/4 with the largest of their residuals: the worst patient alone is not covered."""
    for values in coverage_of_unseen(ERRORS).values():
        assert values == {"level": 0.75, "covered": 3, "patients": 4}
    logits = {"a": histogram(3.0, 0), "b": histogram(1.5, 1)}
    found = calibration_of_unseen(logits)
    assert found["lowest_temperature"] == fit_temperature([logits["b"]])
    assert found["highest_temperature"] == fit_temperature([logits["a"]])
    a, b = (logits[name].calibration(fit_temperature([logits[other]])) for name, other in (("a", "b"), ("b", "a")))
    assert found["ece_calibrated"] == pytest.approx((a + b).ece)
    alike = calibration_of_unseen(ERRORS.logits)
    assert alike["ece_calibrated"] < alike["ece"] / 3
    assert alike["brier_calibrated"] < alike["brier"]


def test_failure_detection_leaves_out_what_is_undefined() -> None:
    scans = [scan(str(k), 1, 1, dice=k / 10, agreement=k / 7) for k in range(6)]
    scans.append(scan("x", 1, 1, dice=0.9, agreement=math.nan))
    assert failure_detection(scans) == {"spearman": pytest.approx(1), "worst_third_found": 1, "scans": 6}


def test_what_is_undefined_is_a_dash_in_the_table(target: Predictor) -> None:
    errors = HeldOutErrors([scan._replace(pairwise_dice=math.nan) for scan in SCANS], ERRORS.logits)
    text = to_markdown(summarize_errors(errors), make_record(errors, target, "fold_residuals", "Folds"))
    assert "| Spearman with Dice, 0 scans | – |" in text
    assert "nan" not in text


def test_cv_plus_stands_with_its_whole_width(target: Predictor) -> None:
    tried = {"level": 0.9, "guarantee": 0.8, "covered": 3, "scans": 4, "width": 21.25}
    summary = {**summarize_errors(ERRORS), "cv_plus": {"infection_ml": tried}}
    text = to_markdown(summary, make_record(ERRORS, target, "fold_residuals", "Folds"))
    assert "| infection_ml, CV+ | 0.90, guaranteed 0.80 | 3 of 4 scans of no fold | 21.25 from end to end |" in text
    tried["width"] = math.nan  # of no scan
    text = to_markdown(summary, make_record(ERRORS, target, "fold_residuals", "Folds"))
    assert "| – from end to end |" in text


@pytest.fixture(scope="module")
def target(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


@pytest.fixture(scope="module")
def evaluator(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    folder = tmp_path_factory.mktemp("evaluator")
    return functools.partial(held_out_errors, trained.data, trained.cache, output_dir=folder, tables=Tables())


@pytest.fixture
def study(trained: Trained, tmp_path: Path) -> Path:
    """The runs of a study of two folds, both of the same models."""
    folders = {"lung": str(trained.lung), "infection": str(trained.infection)}
    runs = [
        {"variant": "robust", "seed": 0, "folders": folders, "split": {"test": [case], "protocol": f"x, fold {k} of 2"}}
        for k, case in ((1, "coronacases_003"), (0, "radiopaedia_14_85914_0"))  # as they may have ended
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    return tmp_path


def test_patients_that_trained_are_refused(evaluator: Evaluator, trained: Trained, tmp_path: Path) -> None:
    split = json.loads(trained.split_file.read_text())
    (tmp_path / "split.json").write_text(json.dumps({**split, "train": split["test"], "test": split["train"][:1]}))
    with pytest.raises(InputError, match="in the training or validation of the models"):
        evaluator(
            lung_checkpoint=trained.lung, infection_checkpoint=trained.infection, split_file=tmp_path / "split.json"
        )


def test_folds_are_tested_on_their_own_cases_and_cv_plus_uses_all(
    evaluator: Evaluator, study: Path, target: Predictor, trained: Trained
) -> None:
    folds = study_folds(study)
    own = evaluator(lung_checkpoint=trained.lung, infection_checkpoint=trained.infection)
    assert {one.patient for one in own.scans} == set(own.logits)
    assert len(own.scans) == 2
    # Each fold is evaluated on the test cases of its models' own split: here both cases, of one pair of models.
    errors = fold_errors(evaluator, folds[:1], target)
    assert errors.scans == own.scans
    summary = summarize_errors(errors)
    assert [row["case"] for row in summary["scans"]] == [one.case for one in own.scans]
    record = make_record(errors, target, "fold_residuals", "1 fold")
    assert record.guarantee is None
    assert record.residuals["infection_ml"] == sorted(errors.patient_residuals("infection_ml").values())
    # Models that are all the same: the CV+ interval is the split interval.
    found = cv_plus_coverage(
        evaluator, folds[:1] * 2, HeldOutErrors([*errors.scans], errors.logits), target, trained.split_file
    )
    for name, quantity in QUANTITIES.items():
        known = [one for one in own.scans if not math.isnan(one.predicted[name] + one.reference[name])]
        residuals = list(errors.patient_residuals(name).values())
        intervals = [split_interval(one.predicted[name], residuals, 2 / 3, quantity) for one in known]
        covered = [is_covered(interval, one.reference[name]) for one, interval in zip(known, intervals, strict=True)]
        assert (found[name]["covered"], found[name]["scans"]) == (sum(covered), len(known))
        assert all(covered)  # the largest residual is one of theirs
    with pytest.raises(InputError, match="at least 2"):
        make_record(
            HeldOutErrors(own.scans[:1], dict(list(own.logits.items())[:1])), target, "split_conformal", "one patient"
        )


def test_masks_of_the_folds_are_made_at_the_targets_thresholds(study: Path, target: Predictor) -> None:
    asked: list[object] = []

    def evaluator(**models: object) -> HeldOutErrors:
        asked.append(models["thresholds"])
        return HeldOutErrors([], {"a": histogram(1.0, 0)})

    folds = study_folds(study)
    both = fold_errors(evaluator, folds, target).logits["a"]
    assert both.counts.sum() == 2 * histogram(1.0, 0).counts.sum()  # a patient whom two folds test
    fold_errors(evaluator, folds, dataclasses.replace(target, thresholds={"lung": 0.5, "infection": 0.3}))
    assert asked == [{"lung": 0.5, "infection": 0.5}] * 2 + [{"lung": 0.5, "infection": 0.3}] * 2


def test_models_of_a_study_that_are_made_otherwise_are_named(
    study: Path, target: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    def evaluator(**_: object) -> HeldOutErrors:
        return HeldOutErrors([], {})

    fold_errors(evaluator, study_folds(study), target)
    assert not caplog.messages
    config = override(target.infection.config, {"model.mirroring": True, "train.epochs": 9})
    fold_errors(
        evaluator, study_folds(study), dataclasses.replace(target, infection=target.infection._replace(config=config))
    )
    (message,) = caplog.messages
    assert message.endswith("config.json: other than the infection model that is calibrated in model.mirroring")
    config = override(config, {"postprocess.infected_scan_ml": 10.0})
    adding = dataclasses.replace(target, infection=target.infection._replace(config=config))
    with pytest.raises(InputError, match=r"config\.json: this model has one view of a slice"):
        fold_errors(evaluator, study_folds(study), adding)


def test_one_model_is_refused(target: Predictor) -> None:
    with pytest.raises(InputError, match="a pair is calibrated"):
        require_pair(dataclasses.replace(target, lung=None))


def test_too_few_patients_in_whom_anything_is_found_are_told(target: Predictor) -> None:
    with pytest.raises(InputError, match=r"0 patient\(s\) in whom the models find lungs and some of the infection"):
        make_record(HeldOutErrors([], {}), target, "split_conformal", "")


def test_models_of_unknown_patients_are_named(target: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    make_record(ERRORS, target, "split_conformal", "4 patients")
    assert "do not list their training patients" not in caplog.text
    unknown = target.lung._replace(config=dataclasses.replace(target.lung.config, train_patients=()))
    make_record(ERRORS, dataclasses.replace(target, lung=unknown), "split_conformal", "4 patients")
    assert "do not list their training patients" in caplog.text


def test_the_bound_of_the_cache_is_handed_on(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[object] = []

    def evaluate(*_: object, **options: object) -> SimpleNamespace:
        bounds.append(options["max_cache_gb"])
        return SimpleNamespace(settings={"seen_patients": []}, volumes=[], logits={})

    monkeypatch.setattr(module, "evaluate", evaluate)
    evaluator(max_cache_gb=3.0)
    assert bounds == [3.0]


def test_without_a_defined_scan_cv_plus_has_no_width(target: Predictor, study: Path) -> None:
    def evaluator(**_: object) -> HeldOutErrors:
        return HeldOutErrors([scan("x", math.nan, 3)], {})

    for values in cv_plus_coverage(evaluator, study_folds(study), ERRORS, target, study).values():
        assert values["scans"] == 0
        assert math.isnan(values["width"])


def test_what_is_no_study_is_named(study: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs\.jsonl: no study \(No such file or directory\)"):
        study_folds(tmp_path / "none")
    with pytest.raises(InputError, match="no such pair of models in it; there are robust with seed 0: choose"):
        study_folds(study, variant="original")
    assert [fold.test for fold in study_folds(study)] == [("radiopaedia_14_85914_0",), ("coronacases_003",)]
    lines = (study / "runs.jsonl").read_text().splitlines(keepends=True)
    (study / "runs.jsonl").write_text("".join([*lines, lines[0].replace('"seed": 0', '"seed": 1')]))
    with pytest.raises(InputError, match="robust with seed 0, robust with seed 1"):
        study_folds(study)
    assert len(study_folds(study, seed=0)) == 2
    (study / "runs.jsonl").write_text(lines[0])
    with pytest.raises(InputError, match="fold 0 is not tested; run its command again"):
        study_folds(study)
    (study / "runs.jsonl").write_text("".join([*lines, lines[0]]))
    with pytest.raises(
        InputError, match=r"coronacases_003 is tested by two runs, \S+ and \S+; a study is needed whose"
    ):
        study_folds(study)


def test_cv_plus_is_tried_on_patients_of_no_fold(phantom: Path, tmp_path: Path) -> None:
    folds = [Fold(Path("lung"), Path("infection"), (case,)) for case in ("radiopaedia_10_85902_1", "coronacases_001")]
    file = tmp_path / "split.json"
    file.write_text('{"train": [], "test": ["coronacases_003"]}')
    check_of_no_fold(folds, file, phantom, Tables())
    check_of_no_fold(folds, None, phantom, Tables())
    file.write_text('{"train": [], "test": ["radiopaedia_10_85902_3"]}')  # another scan of one whom a fold has tested
    with pytest.raises(InputError, match="radiopaedia_10: tested by a fold"):
        check_of_no_fold(folds, file, phantom, Tables())
    with pytest.raises(InputError, match="cannot read the split"):
        check_of_no_fold(folds, tmp_path / "none.json", phantom, Tables())


def test_the_models_of_every_fold_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    infection, lung = Config(task="infection"), Config()
    narrow = override(infection, {"model.filters": [4, 8, 16, 32]})
    for name, config in (("lung", lung), ("first", infection), ("second", narrow)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", to_dict(config))
    folds = [Fold(tmp_path / "lung", tmp_path / name, ()) for name in ("first", "second")]
    models = {"lung": SimpleNamespace(config=lung), "infection": SimpleNamespace(config=infection)}
    target = cast("Predictor", SimpleNamespace(models=models, mask_settings={"infection_postprocess": {}}))
    fold_errors(lambda **_: HeldOutErrors([], {}), folds, target)
    assert "second/config.json: other than the infection model" in caplog.text


def test_from_patients_left_out_to_the_report_of_a_scan(trained: Trained, tmp_path: Path) -> None:
    infection, case = tmp_path / "infection", find_cases(trained.data)[0]
    shutil.copytree(trained.infection, infection)
    models = (f"--lung_checkpoint={trained.lung}", f"--infection_checkpoint={infection}")
    data = (f"--data_dir={trained.data}", f"--cache_dir={trained.cache}")
    result = run_script("calibrate", *data, *models, f"--output_dir={tmp_path / 'c'}")
    assert result.returncode == 0, result.stderr
    assert "| without |" in result.stdout
    record = load_record(infection)
    assert record is not None
    assert (record.method, record.patients, record.guarantee) == ("split_conformal", 2, 2 / 3)
    assert record.patient_ids == ("coronacases_003", "radiopaedia_14")
    assert json.loads((tmp_path / "c" / UNCERTAINTY_FILE).read_text()) == json.loads(record.to_json())
    assert str(tmp_path) not in record.to_json()
    assert {"calibration", "failure_detection", "coverage", "scans"} == set(
        json.loads((tmp_path / "c" / "summary.json").read_text())
    )
    flags = (*models, f"--input={case.ct}", f"--output_dir={tmp_path / 'out'}")
    result = run_script("predict", *flags, "--uncertainty")
    assert result.returncode == 0, result.stderr
    assert "_uncertainty.nii.gz" in result.stdout
    (file,) = (tmp_path / "out").glob("*_report.json")
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["uncertainty"]["members"] == 4
    assert report["uncertainty"]["temperature"] == record.temperature
    assert report["uncertainty"]["interval"]["method"] == "split_conformal"
    volume = report["infection"]["volume_ml"]
    assert report["infection"]["volume_interval_ml"] == pytest.approx(record.interval("infection_ml", volume))
    page = file.with_suffix(".html").read_text(encoding="utf-8")
    assert 'data-layer="uncertainty"' in page
    assert "held-out" in page
    with (tmp_path / "out" / "cohort.csv").open(encoding="utf-8", newline="") as table:
        (row,) = csv.DictReader(table)
    assert float(row["infection_high_ml"]) == pytest.approx(report["infection"]["volume_interval_ml"][1], abs=1e-4)
    result = run_script("evaluate", *data, *models, f"--output_dir={tmp_path / 'e'}", "--uncertainty")
    assert result.returncode == 0, result.stderr
    assert "Intervals at 0.67 cover the infection's volume in 2 of 2" in result.stdout  # as they are made from them
    assert "the intervals and the temperature come from these patients" in result.stderr.replace("\n", " ")
    assert "with temperature" in result.stdout
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert set(metrics["reported_calibration"]) == {"without_temperature", "with_temperature"}
    rows = [row for row in metrics["volumes"] if row["structure"] == "infection"]
    assert all(row["volume_low_ml"] <= row["volume_ml"] <= row["volume_high_ml"] for row in rows)


def test_uncertainty_is_refused_without_an_infection_model(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`uncertainty` is of the infection"):
        evaluate(trained.data, trained.cache, output_dir=tmp_path / "e", lung_checkpoint=trained.lung, uncertainty=True)
    flags = (f"--lung_checkpoint={trained.lung}", f"--input={find_cases(trained.data)[0].ct}", "--uncertainty")
    result = run_script("predict", *flags, f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert "--uncertainty is of the infection" in result.stderr
    assert not list(tmp_path.glob("**/*.nii.gz"))
