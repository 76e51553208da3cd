import csv
import dataclasses
import json
import math
import shutil
from operator import itemgetter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import read_mask, read_volume
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.errors import InputError
from resunet_jax.evaluation.compare import Evaluation, evaluate_cases, summarize
from resunet_jax.evaluation.evaluate import evaluate
from resunet_jax.evaluation.report import best_median_worst, print_table, write_csv, write_report
from resunet_jax.files import json_text
from resunet_jax.inference.predictor import load_predictor
from resunet_jax.inference.scan import segment_scan
from resunet_jax.metrics import COLUMNS, LEGACY_KEYS, METRICS, Metric, with_legacy_keys
from resunet_jax.metrics.overlap import soft_metrics
from resunet_jax.plugins import Tables
from tests.conftest import WITH_CONTEXT, Trained
from tests.inference.test_uncertainty import record_of


@pytest.fixture(scope="module")
def evaluation(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(
        trained.data,
        trained.cache,
        output_dir=tmp_path_factory.mktemp("report"),
        lung_checkpoint=trained.lung,
        infection_checkpoint=trained.infection,
    )


def test_counts_are_those_of_the_written_masks(evaluation: Evaluation, trained: Trained, tmp_path: Path) -> None:
    """Evaluation and prediction agree voxel for voxel, so the native Dice is the Dice of the files."""
    predictor = load_predictor(trained.lung, trained.infection, batch_size=3)
    cases = {case.id: case for case in find_cases(trained.data)}
    rows = [row for row in evaluation.volumes if row["structure"] in ("lung", "infection")]
    assert len(rows) == 4
    for row in rows:
        case = cases[row["case"]]
        volume = read_volume(case.ct)
        paths = dict(zip(("lung", "infection"), segment_scan(case.ct, tmp_path, predictor), strict=True))
        predicted = read_mask(paths[row["structure"]], case.ct, volume.grid) > 0
        actual = read_mask(getattr(case, f"{row['structure']}_mask"), case.ct, volume.grid) > 0
        assert row["tp"] == (predicted & actual).sum()
        assert row["fp"] == (predicted & ~actual).sum()
        assert row["fn"] == (~predicted & actual).sum()
        assert sum(row[name] for name in ("tp", "fp", "fn", "tn")) == actual.size


@pytest.mark.parametrize(("labels", "warned"), [([0, 2, 1], True), ([0, 1, 3], False), ([0, 4, 2], False)])
def test_sides_are_compared_where_labels_are_those_of_left_and_right(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[int], *, warned: bool
) -> None:
    """Not where they are exchanged, or lobes."""
    case = find_cases(trained.data)[0]
    image = nib.load(case.lung_mask)
    values = np.array(labels, np.uint8)[np.asarray(image.dataobj).astype(int)]
    if not warned:
        values[..., -1:] = np.where(values[..., -1:], 5, 0)
        values[0, 0, 0], values[0, 0, 1] = 1, 2
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "lung.nii.gz")
    changed = dataclasses.replace(case, lung_mask=tmp_path / "lung.nii.gz")
    prepared = prepare_cases([changed], WITH_CONTEXT, tmp_path / "cache")
    found = evaluate_cases(load_predictor(trained.lung, trained.infection), prepared)
    assert {row["structure"] for row in found.volumes} == {"lung", "infection"}
    assert ("lies on the right; the lungs are not compared by side" in caplog.text) == warned


def test_does_not_depend_on_batch_size_or_order(evaluation: Evaluation, trained: Trained) -> None:
    cases = [case for case in find_cases(trained.data) if case.id in {row["case"] for row in evaluation.volumes}]
    prepared = prepare_cases(cases[::-1], WITH_CONTEXT, trained.cache)
    other = evaluate_cases(load_predictor(trained.lung, trained.infection, batch_size=5), prepared)
    key = itemgetter("case", "structure")
    np.testing.assert_equal(sorted(other.volumes, key=key), sorted(evaluation.volumes, key=key))
    np.testing.assert_equal(sorted(other.model_grid, key=key), sorted(evaluation.model_grid, key=key))


def test_soft_metrics_are_means_over_batches_of_four(evaluation: Evaluation, trained: Trained) -> None:
    cases = [case for case in find_cases(trained.data) if case.id in {row["case"] for row in evaluation.volumes}]
    prepared = prepare_cases(cases, WITH_CONTEXT, trained.cache)
    predictor = load_predictor(trained.lung, None)
    probability = np.concatenate([predictor.slice_probabilities(one.images)["lung"] for one in prepared])
    target = np.concatenate([one.lung[..., 0] for one in prepared])
    batches = [soft_metrics(probability[i : i + 4], target[i : i + 4]) for i in range(0, len(target), 4)]
    expected = np.mean([batch["dice"] for batch in batches])
    np.testing.assert_allclose(evaluation.soft_batch["lung"]["dice"], expected, rtol=1e-5)


def test_volumes_and_errors_follow_from_the_counts(evaluation: Evaluation, trained: Trained) -> None:
    cases = {case.id: case for case in find_cases(trained.data)}
    for row in evaluation.volumes:
        voxel_ml = float(np.prod(nib.load(cases[row["case"]].ct).header.get_zooms())) / 1000
        np.testing.assert_allclose(row["volume_ml"], (row["tp"] + row["fp"]) * voxel_ml, rtol=1e-5)
        np.testing.assert_allclose(row["reference_ml"], (row["tp"] + row["fn"]) * voxel_ml, rtol=1e-5)
        assert row["volume_error_ml"] == row["volume_ml"] - row["reference_ml"]
        assert math.isnan(row["lung_involvement"]) == (row["structure"] != "infection")
        if row["structure"] == "infection":
            lung = nib.load(cases[row["case"]].lung_mask).get_fdata() > 0
            infection = nib.load(cases[row["case"]].infection_mask).get_fdata() > 0
            assert row["reference_lung_involvement"] == pytest.approx((infection & lung).sum() / lung.sum())


def test_sides_add_up_to_the_lung(evaluation: Evaluation) -> None:
    rows = {(row["case"], row["structure"]): row for row in evaluation.volumes}
    for case in {row["case"] for row in evaluation.volumes}:
        left, right, lung = (rows[case, s] for s in ("left_lung", "right_lung", "lung"))
        assert left["volume_ml"] + right["volume_ml"] == pytest.approx(lung["volume_ml"])
        assert left["reference_ml"] + right["reference_ml"] == pytest.approx(lung["reference_ml"])
        assert min(left["reference_ml"], right["reference_ml"]) > 0.3 * lung["reference_ml"]


def test_slices_add_up_to_volumes(evaluation: Evaluation) -> None:
    for row in evaluation.volumes:
        slices = [s for s in evaluation.slices if (s["case"], s["structure"]) == (row["case"], row["structure"])]
        assert [s["slice"] for s in slices] == list(range(len(slices)))
        for name in ("tp", "fp", "fn", "tn"):
            assert sum(s[name] for s in slices) == row[name]


def test_threshold_of_the_validation_cases_is_used(trained: Trained, tmp_path: Path) -> None:
    values = json.loads((trained.lung / "threshold.json").read_text())
    assert values["chosen_on"] == ["coronacases_002"]
    shutil.copytree(trained.lung, tmp_path / "lung")
    (tmp_path / "lung" / "threshold.json").write_text(json.dumps({**values, "threshold": 0.05}))
    predictor = load_predictor(tmp_path / "lung", None, validated_threshold=True)
    assert predictor.threshold("lung") == 0.05
    (case,) = [case for case in find_cases(trained.data) if case.id == "coronacases_003"]
    prepared = prepare_cases([case], WITH_CONTEXT, trained.cache)
    low, half = (evaluate_cases(s, prepared).volumes[0] for s in (predictor, load_predictor(trained.lung, None)))
    assert low["tp"] + low["fp"] > half["tp"] + half["fp"]
    (mask,) = segment_scan(case.ct, tmp_path / "masks", predictor)
    assert np.count_nonzero(nib.load(mask).dataobj) == low["tp"] + low["fp"]
    (tmp_path / "lung" / "threshold.json").unlink()
    with pytest.raises(InputError, match=r"threshold\.json: no such file.*leave `validated_threshold` out"):
        load_predictor(tmp_path / "lung", None, validated_threshold=True)
    for text in ("{}", "[]", '{"threshold": 1.5}', '{"threshold": "a"}', "x"):
        (tmp_path / "lung" / "threshold.json").write_text(text)
        with pytest.raises(InputError, match="holds no threshold"):
            load_predictor(tmp_path / "lung", None, validated_threshold=True)


def row(case: str, dice: float) -> dict:
    return {**dict.fromkeys(METRICS, 1.0), "case": case, "patient": case, "structure": "lung", "dice": dice}


def test_summary_leaves_out_what_is_undefined_and_says_so() -> None:
    summary = summarize([row("a", 0.5), row("b", 1.0), row("c", 0.9), row("d", math.nan)])["lung"]["dice"]
    assert summary["mean"] == pytest.approx(0.8)
    assert (summary["volumes"], summary["undefined"]) == (4, 1)


def test_json_has_null_for_undefined() -> None:
    evaluation = Evaluation([row("a", math.nan)], [], [], {}, {}, [], {"min_component_fraction": 0.0})
    values = json.loads(evaluation.to_json())
    assert values["volumes"][0]["dice"] is None
    assert values["summary"]["lung"]["dice"]["mean"] is None


def test_report_files(evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(evaluation, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json",
        "volumes.csv",
        "slices.csv",
        "boxes.png",
        "volumes.png",
        "calibration.png",
        "overlays.png",
    }
    values = json.loads((tmp_path / "metrics.json").read_text())
    by_burden = {"infection_dice_by_burden", "infection_dice_by_load"}
    assert set(values) == {"settings", "volumes", "summary", *by_burden, "model_grid", "calibration", "soft_batch"}
    assert values["infection_dice_by_burden"] == values["infection_dice_by_load"] != {}
    assert values["settings"] == {
        "protocol": "test subset of a split file",
        "seen_patients": [],
        "threshold": {"lung": 0.5, "infection": 0.5},
        "min_component_fraction": 0.0,
        "smallest_region": 0.0,
        "infection_postprocess": {
            "gate": "none",
            "gate_closing_mm": 20.0,
            "min_lesion_ml": 0.0,
            "min_lesion_probability": 0.0,
            "keep_lesion_ml": 20.0,
        },
        "tolerance_mm": {"lung": 1.0, "infection": 3.0},
    }
    assert {(r["case"], r["structure"]) for r in values["volumes"]} == {
        (case, structure)
        for case in ("coronacases_003", "radiopaedia_14_85914_0")
        for structure in ("lung", "left_lung", "right_lung", "infection")
    }
    with (tmp_path / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["case"] for r in rows] == [r["case"] for r in evaluation.volumes]
    for row in (*values["volumes"], *values["summary"].values(), *rows):
        renamed = {new for new in LEGACY_KEYS.values() if new in row}
        assert renamed >= {"false_positive_lesions", "lung_involvement_error"}
        assert {old for old in LEGACY_KEYS if old in row} == {o for o, new in LEGACY_KEYS.items() if new in renamed}
        assert all(row[old] == row[new] for old, new in LEGACY_KEYS.items() if new in renamed)
    assert set(LEGACY_KEYS.values()) < set(rows[0])
    for written, found in zip(values["volumes"], evaluation.volumes, strict=True):
        assert written == json.loads(json_text(with_legacy_keys(found)))
    print_table(evaluation)
    out = capsys.readouterr().out
    assert "radiopaedia_14_85914_0" in out
    assert "never with the Dice of volumes" in " ".join(out.split())
    assert out.count("undefined") >= 4


def test_slices_that_are_kept_keep_no_volume(evaluation: Evaluation) -> None:
    for _, overlay in evaluation.overlays:
        assert all(mask.base is None for masks in overlay[2:] for mask in masks.values())


def test_pictures_of_a_lung_model_alone_have_the_dice_of_the_lung(trained: Trained) -> None:
    predictor = load_predictor(trained.lung)
    cases = prepare_cases(find_cases(trained.data)[:2], predictor.preprocess, trained.cache)
    evaluation = evaluate_cases(predictor, cases)
    dice = [row["dice"] for row in evaluation.volumes if row["structure"] == "lung"]
    assert [value for value, _ in evaluation.overlays] == dice


def test_names_may_hold_what_figures_and_tables_take_for_markup(
    evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a$b_$ [left]"
    volumes = [{**row, "case": name} for row in evaluation.volumes]
    overlays = [(dice, overlay._replace(title=f"{name}: $\\foo$")) for dice, overlay in evaluation.overlays]
    renamed = dataclasses.replace(evaluation, volumes=volumes, overlays=overlays)
    write_report(renamed, tmp_path)
    print_table(renamed)
    assert name in capsys.readouterr().out


def test_a_table_has_a_column_for_every_key(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [{"a": 1}, {"a": 2, "b": math.nan}, {"b": 3}])
    assert (tmp_path / "table.csv").read_text().splitlines() == ["a,b", "1,", "2,", ",3"]


def test_best_median_and_worst_are_shown(evaluation: Evaluation) -> None:
    overlay = evaluation.overlays[0][1]
    cases = [
        (dice, overlay._replace(title=name)) for name, dice in zip("abcde", (0.3, math.nan, 0.9, 0.5, 0.7), strict=True)
    ]
    titles = [shown.title for shown in best_median_worst(cases)]
    assert [title[-1] for title in titles] == ["c", "d", "a"]
    assert [title.split(",")[0] for title in titles] == ["best", "median", "worst"]
    assert [shown.title[-1] for shown in best_median_worst(cases[:2])] == ["a"]
    assert [shown.title for shown in best_median_worst(cases[1:2])] == ["b"]


def test_protocol_with_missing_cases_marks_the_numbers(trained: Trained, tmp_path: Path) -> None:
    protocol = "original; 14 of 20 cases missing: some"
    split_file = tmp_path / "split.json"
    split_file.write_text(json.dumps({"train": [], "val": [], "test": ["coronacases_001"], "protocol": protocol}))
    evaluation = evaluate(
        trained.data, trained.cache, output_dir=tmp_path, lung_checkpoint=trained.lung, split_file=split_file
    )
    assert evaluation.settings["protocol"] == f"test subset of {protocol}"
    write_report(evaluation, tmp_path / "report")
    assert protocol in (tmp_path / "report" / "volumes.csv").read_text().splitlines()[1]


def test_without_lung_there_is_no_interval(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = load_predictor(trained.lung, trained.infection, thresholds={"lung": 0.999})
    predictor = dataclasses.replace(predictor, record=record_of(predictor))
    prepared = prepare_cases(find_cases(trained.data)[:1], WITH_CONTEXT, trained.cache)
    evaluation = evaluate_cases(predictor, prepared)
    (row,) = (row for row in evaluation.volumes if row["structure"] == "infection")
    assert row["volume_ml"] == 0
    assert np.isnan([row["volume_low_ml"], row["volume_high_ml"], row["involvement_low_percent"]]).all()
    print_table(evaluation)
    out = capsys.readouterr().out
    assert "where postprocessing has left it: ECE –, Brier –" in " ".join(out.split())
    assert "cover the infection's volume" not in out


def test_split_comes_from_the_models_or_a_file(trained: Trained, tmp_path: Path) -> None:
    def run(**changes) -> list[str]:
        arguments = {"output_dir": tmp_path, "lung_checkpoint": trained.lung, **changes}
        volumes = evaluate(trained.data, trained.cache, **arguments).volumes
        return [row["case"] for row in volumes if row["structure"] == "lung"]

    assert run(subset="val") == ["coronacases_002"]
    assert len(run(subset="all")) == 6
    other = tmp_path / "split.json"
    other.write_text('{"train": [], "val": [], "test": ["coronacases_001"]}')
    assert run(split_file=other) == ["coronacases_001"]
    with pytest.raises(InputError, match="no val case"):
        run(split_file=other, subset="val")


def test_a_metric_cannot_have_the_name_of_another_column(evaluation: Evaluation, trained: Trained) -> None:
    columns = set().union(*evaluation.volumes) - set(METRICS)
    assert columns <= set(COLUMNS)
    for name in COLUMNS:
        with pytest.raises(InputError, match=f"metrics: a row has another column of the name '{name}'"):
            evaluate_cases(load_predictor(trained.lung), [], metrics=METRICS | {name: METRICS["dice"]})
        with pytest.raises(InputError, match=f"a plugin: a row has another column of the name '{name}'"):
            Tables().extended({"metrics": {name: METRICS["dice"]}}, "a plugin")


def test_a_metric_that_is_added_appears_everywhere(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = METRICS | {"toy_litres": Metric(lambda c: c.volumes_ml[0] / 1000, "TOY", "l")}
    metrics |= {f"toy_{k}": Metric(lambda c: 1000.5, f"number {k}") for k in range(3)}
    evaluation = evaluate(
        trained.data, trained.cache, output_dir=tmp_path, lung_checkpoint=trained.lung, metrics=metrics
    )
    assert evaluation.volumes
    assert all(row["toy_litres"] == row["volume_ml"] / 1000 for row in evaluation.volumes)
    write_report(evaluation, tmp_path)
    values = json.loads((tmp_path / "metrics.json").read_text())
    expected = [row["toy_litres"] for row in evaluation.volumes if row["structure"] == "lung"]
    assert [row["toy_litres"] for row in values["volumes"] if row["structure"] == "lung"] == expected
    assert values["summary"]["lung"]["toy_litres"]["mean"] == pytest.approx(np.mean(expected))
    with (tmp_path / "volumes.csv").open() as file:
        assert [float(r["toy_litres"]) for r in csv.DictReader(file) if r["structure"] == "lung"] == expected
    print_table(evaluation)
    printed = " ".join(capsys.readouterr().out.split())
    assert "TOY l" in printed
    assert "…" not in printed  # no heading is cut
    assert "toy_litres" not in METRICS
