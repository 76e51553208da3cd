"""What is written beside the masks, for one scan, for many, and by several processes."""

import csv
import dataclasses
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from resunet_jax import Predictor, load_predictor
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import find_sources
from resunet_jax.errors import InputError
from resunet_jax.evaluation.evaluate import evaluate
from resunet_jax.inference.batch import MANIFEST, Summary, segment_scans
from resunet_jax.report.outputs import make_outputs, write_cohort
from tests.conftest import Trained


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


@pytest.fixture(scope="module")
def scans(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "scans"
    folder.mkdir()
    for name, case in zip(("a", "b"), find_cases(trained.data), strict=False):
        shutil.copy(case.ct, folder / f"{name}.nii")
    return folder


@pytest.fixture(scope="module")
def written(scans: Path, predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    results = list(segment_scans(find_sources(scans), folder, predictor, outputs=make_outputs(multilabel=True)))
    assert all(result.error is None and "grade" in result.summary for result in results)
    write_cohort(folder)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "cohort.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_report_is_of_the_written_masks(written: Path) -> None:
    for name in ("a", "b"):
        report = json.loads((written / f"{name}_report.json").read_text(encoding="utf-8"))
        lung, infection = (load(written / f"{name}_{kind}.nii.gz") for kind in ("lung", "infection"))
        ml = abs(np.linalg.det(nib.load(written / f"{name}_lung.nii.gz").affine[:3, :3])) / 1000
        assert report["lung"]["volume_ml"] == pytest.approx(lung.sum() * ml)
        assert report["infection"]["volume_ml"] == pytest.approx(infection.sum() * ml)
        if lung.any():
            assert report["infection"]["involvement_percent"] == pytest.approx(
                100 * (lung & infection).sum() / lung.sum()
            )
        labels = load(written / f"{name}_labels.nii.gz")
        np.testing.assert_array_equal(labels == 3, infection > 0)
        np.testing.assert_array_equal((labels > 0), (lung | infection) > 0)
        for kind in ("report.html", "preview.png"):
            assert (written / f"{name}_{kind}").stat().st_size > 5000


def test_numbers_are_those_of_the_evaluation(trained: Trained, predictor: Predictor, tmp_path: Path) -> None:
    evaluation = evaluate(
        trained.data,
        trained.cache,
        output_dir=tmp_path / "report",
        lung_checkpoint=trained.lung,
        infection_checkpoint=trained.infection,
        subset="all",
    )
    case = find_cases(trained.data)[0]
    list(segment_scans(find_sources(case.ct), tmp_path / "masks", predictor, outputs=make_outputs()))
    (file,) = (tmp_path / "masks").glob("*_report.json")
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["structure"]: row for row in evaluation.volumes if row["case"] == case.id}
    assert report["lung"]["volume_ml"] == pytest.approx(rows["lung"]["volume_ml"])
    assert report["lung"]["left_ml"] == pytest.approx(rows["left_lung"]["volume_ml"])
    assert report["lung"]["right_ml"] == pytest.approx(rows["right_lung"]["volume_ml"])
    assert report["infection"]["volume_ml"] == pytest.approx(rows["infection"]["volume_ml"])
    involvement = report["infection"]["involvement_percent"]
    assert involvement == pytest.approx(100 * rows["infection"]["lung_involvement"], nan_ok=True)


def test_warnings_are_kept_with_the_masks_and_without_a_report_too(
    scans: Path, predictor: Predictor, written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = json.loads((written / MANIFEST).read_text())["scans"]
    reports = {name: json.loads((written / f"{name}_report.json").read_text(encoding="utf-8")) for name in ("a", "b")}
    assert {name: kept[f"{name}.nii"]["warnings"] for name in reports} == {
        name: report["warnings"] for name, report in reports.items()
    }
    list(segment_scans(find_sources(scans), tmp_path, predictor, outputs=make_outputs(report=False)))
    again = json.loads((tmp_path / MANIFEST).read_text())["scans"]
    assert {name: one["warnings"] for name, one in again.items()} == {
        name: one["warnings"] for name, one in kept.items()
    }
    assert not list(tmp_path.glob("*_report.*"))


def test_a_missing_report_is_made_again_and_another_setting_makes_all_again(
    scans: Path, predictor: Predictor, written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)

    def skipped(**options) -> list[bool]:
        outputs = make_outputs(multilabel=True, **options)
        return [result.skipped for result in segment_scans(find_sources(scans), folder, predictor, outputs=outputs)]

    assert skipped() == [True, True]
    (folder / "a_report.html").unlink()
    assert skipped() == [False, True]
    assert skipped(consolidation_hu=-100.0) == [False, False]


def test_no_report_lies_next_to_masks_of_another_prediction(
    scans: Path, predictor: Predictor, written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where an output fails after the masks, and where it is no longer asked for."""
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    (source,) = find_sources(scans / "a.nii")
    other = dataclasses.replace(predictor, thresholds={"lung": 0.4})

    def fail(*_) -> Summary:
        raise InputError("full")

    report = make_outputs()["report"]
    (result,) = segment_scans([source], folder, other, outputs={"report": report._replace(write=fail)})
    assert str(result.error) == "full"
    assert not list(folder.glob("a_report.*"))
    assert f"{folder / 'a_labels.nii.gz'}: stays next to the new masks" in caplog.text
    assert "b_" not in caplog.text


@pytest.mark.parametrize(
    ("forms", "words", "follows"),
    [((0, 0), "left and right are a guess", False), ((1, 1), "mm apart; the sform is used", False), ((1, 0), "", True)],
)
def test_a_doubtful_header_is_a_warning_of_the_report(
    scans: Path, predictor: Predictor, tmp_path: Path, forms: tuple[int, int], words: str, follows: bool
) -> None:
    image = nib.load(scans / "a.nii")
    affine = image.affine.copy()
    image.set_sform(affine, forms[0])
    image.set_qform(affine @ np.diag([-1, 1, 1, 1]), forms[1])
    nib.save(image, tmp_path / "a.nii")
    (result,) = segment_scans(find_sources(tmp_path / "a.nii"), tmp_path / "out", predictor, outputs=make_outputs())
    assert result.error is None
    report = json.loads((tmp_path / "out" / "a_report.json").read_text(encoding="utf-8"))
    of_header = [warning for warning in report["warnings"] if "form" in warning]
    assert len(of_header) == (not follows)
    assert all(words in warning for warning in of_header)
    assert any("follow the header" in note for note in report["notes"]) == follows


@pytest.mark.parametrize("name", ["cohort.csv", "index.html"])
def test_a_table_that_is_not_of_predictions_is_not_replaced(
    scans: Path, predictor: Predictor, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=rf"{name}: would be replaced, though no masks\.json there"):
        next(segment_scans(find_sources(scans), tmp_path, predictor, outputs=make_outputs()))
    assert write_cohort(tmp_path) == []
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {name: "mine"}


def test_a_scan_that_can_no_longer_be_read_leaves_the_table(
    scans: Path, predictor: Predictor, written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    shutil.copytree(scans, tmp_path / "scans")
    (tmp_path / "scans" / "a.nii").write_bytes(b"no scan")
    outputs = make_outputs(multilabel=True)
    failed, skipped = segment_scans(find_sources(tmp_path / "scans"), folder, predictor, outputs=outputs)
    assert failed.error
    assert not skipped.error
    assert not list(folder.glob("a_report.*"))
    assert not (folder / "a_preview.png").exists()
    assert f"{folder / 'a_report.json'}: removed" in caplog.text
    write_cohort(folder)
    assert "b" in (folder / "cohort.csv").read_text(encoding="utf-8").splitlines()[1]
    assert len((folder / "cohort.csv").read_text(encoding="utf-8").splitlines()) == 2


def test_cohort_lists_every_report_of_the_folder_and_names_what_is_none(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    (folder / "c_report.json").write_text("{")
    others = ('{"schema_version": 1}', '{"schema_version": 1, "warnings": []}')
    for name, other in zip("dfg", (*others, '{"schema_version": 1, "warnings": [], "scan": "x"}'), strict=True):
        (folder / f"{name}_report.json").write_text(other)
    text = (folder / "a_report.json").read_text(encoding="utf-8")
    (folder / ".partial-host-1-a_report.json").write_text(text, encoding="utf-8")
    report = {**json.loads(text), "scan": {**json.loads(text)["scan"], "name": "e\udce9"}}
    report = json.dumps(report, ensure_ascii=False)
    (folder / "e_report.json").write_text(report, encoding="utf-8", errors="surrogateescape")
    write_cohort(folder)
    with (folder / "cohort.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a", "b", "e\udce9"]
    for name in ("c", "d", "f", "g"):
        assert f"{name}_report.json: left out" in caplog.text
    page = (folder / "index.html").read_text(encoding="utf-8", errors="surrogateescape")
    assert 'href="a_report.html"' in page
    for path in folder.glob("*_report.json"):
        path.unlink()
    assert write_cohort(folder) == [folder / "cohort.csv", folder / "index.html"]
    assert len((folder / "cohort.csv").read_text(encoding="utf-8").splitlines()) == 1
    assert write_cohort(tmp_path) == []


def test_the_table_is_of_all_reports_whoever_writes_it(written: Path, tmp_path: Path) -> None:
    """A process that has read the reports writes its table before another reads them."""
    shutil.copytree(written, tmp_path / "copy")
    with ThreadPoolExecutor(1) as executor, FileLock(tmp_path / "copy" / ".locks" / ".cohort.csv.lock"):
        (tmp_path / "copy" / "cohort.csv").unlink()
        writing = executor.submit(write_cohort, tmp_path / "copy")
        with pytest.raises(TimeoutError):
            writing.result(timeout=0.5)
        assert not (tmp_path / "copy" / "cohort.csv").exists()
        shutil.copy(written / "a_report.json", tmp_path / "copy" / "c_report.json")
    writing.result()
    assert len(table(tmp_path / "copy")) == 3


def test_several_on_one_folder_share_the_scans_out(scans: Path, predictor: Predictor, tmp_path: Path) -> None:
    """Each scan is segmented once, whoever does it, and both see all of them in the end."""

    def work(_: int) -> list:
        results = list(segment_scans(find_sources(scans), tmp_path, predictor, outputs=make_outputs()))
        write_cohort(tmp_path)
        return results

    with ThreadPoolExecutor(2) as executor:
        first, second = executor.map(work, range(2))
    done = [result.scan.name for result in (*first, *second) if not result.skipped]
    assert sorted(done) == ["a", "b"]
    assert len(table(tmp_path)) == 2


def test_lobes_on_another_grid_are_refused(scans: Path, predictor: Predictor, written: Path, tmp_path: Path) -> None:
    lobes = tmp_path / "lobes.nii.gz"
    image = nib.load(written / "a_lung.nii.gz")
    values = np.ones(image.shape, np.uint8)
    values[..., ::2] = 2
    nib.save(nib.Nifti1Image(values, image.affine), lobes)
    (source,) = find_sources(scans / "a.nii")
    (result,) = segment_scans([source], tmp_path / "out", predictor, outputs=make_outputs(lobes=lobes))
    assert result.error is None
    report = json.loads((tmp_path / "out" / "a_report.json").read_text(encoding="utf-8"))
    assert set(report["lobes"]) == {"1", "2", "score"}
    nib.save(nib.Nifti1Image(values[..., 1:], image.affine), lobes)
    (result,) = segment_scans([source], tmp_path / "out", predictor, outputs=make_outputs(lobes=lobes))
    assert "lobes.nii.gz: shape" in str(result.error)
    nib.save(nib.Nifti1Image(0 * values, image.affine), lobes)
    (result,) = segment_scans([source], tmp_path / "out", predictor, outputs=make_outputs(lobes=lobes))
    assert "lobes.nii.gz: every voxel is 0" in str(result.error)
    assert json.loads(next((tmp_path / "out").glob("*_report.json")).read_text(encoding="utf-8")) == report  # as before
    with pytest.raises(InputError, match="their numbers are in the report"):
        make_outputs(lobes=lobes, report=False)
    with pytest.raises(InputError, match="`consolidation_hu` is nan"):
        make_outputs(consolidation_hu=math.nan)
    with pytest.raises(InputError, match="none"):
        make_outputs(lobes=tmp_path / "none.nii")
