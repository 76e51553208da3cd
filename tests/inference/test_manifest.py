"""What is done before, and what has to be done again."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax import config as config_module
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import find_sources, read_volume
from resunet_jax.inference.batch import MANIFEST, segment_scans
from resunet_jax.inference.predictor import Predictor, load_predictor
from tests.conftest import Trained
from tests.dicom_files import write_series


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


def copies(trained: Trained, folder: Path, count: int) -> Path:
    folder.mkdir()
    for i, case in enumerate(find_cases(trained.data)[:count]):
        shutil.copy(case.ct, folder / f"scan_{i}.nii")
    return folder


def test_another_scan_of_the_same_name_size_and_time_is_segmented(trained: Trained, predictor, tmp_path: Path) -> None:
    path = tmp_path / "imaging.nii"
    for i, case in enumerate(find_cases(trained.data)[:2]):
        image = nib.load(case.ct)
        values = np.asarray(image.dataobj)[:85, :85]
        nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
        os.utime(path, (315532800, 315532800))
        (result,) = segment_scans(find_sources(path), tmp_path / "masks", predictor)
        assert not result.skipped, i
        (again,) = segment_scans(find_sources(path), tmp_path / "masks", predictor)
        assert again.skipped


def test_series_of_one_folder_do_not_forget_each_other(trained: Trained, predictor, tmp_path: Path) -> None:
    """Also where no UID tells them apart."""
    volume = read_volume(find_cases(trained.data)[0].ct)
    hu = np.rint(volume.to_hu()).astype(int)
    write_series(tmp_path / "scans", hu, uid="")
    write_series(tmp_path / "scans", hu[:-2], uid="", number=2)
    scans = find_sources(tmp_path / "scans")
    results = list(segment_scans(scans, tmp_path / "masks", predictor))
    assert [result.error for result in results] == [None, None]
    assert all(result.skipped for result in segment_scans(scans, tmp_path / "masks", predictor))


def test_another_version_makes_masks_again_and_says_so(
    trained: Trained, predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scans = find_sources(copies(trained, tmp_path / "scans", 1))
    list(segment_scans(scans, tmp_path / "masks", predictor))
    monkeypatch.setattr(config_module, "__version__", "99.0.0")
    with caplog.at_level("INFO", "resunet_jax"):
        (result,) = segment_scans(scans, tmp_path / "masks", predictor)
    assert not result.skipped
    assert "another version; masks are made again" in caplog.text


def test_two_predictions_into_one_folder_lose_no_record(trained: Trained, predictor, tmp_path: Path) -> None:
    scans = find_sources(copies(trained, tmp_path / "scans", 4))
    with ThreadPoolExecutor(2) as executor:
        halves = (scans[:2], scans[2:])
        list(executor.map(lambda half: list(segment_scans(half, tmp_path / "masks", predictor)), halves))
    assert set(json.loads((tmp_path / "masks" / MANIFEST).read_text())["scans"]) == {s.path.name for s in scans}
    assert all(result.skipped for result in segment_scans(scans, tmp_path / "masks", predictor))


def test_masks_of_another_prediction_beside_the_new_ones_are_named(
    trained: Trained, predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scans = find_sources(copies(trained, tmp_path / "scans", 1))
    list(segment_scans(scans, tmp_path / "masks", predictor))
    list(segment_scans(scans, tmp_path / "masks", load_predictor(trained.lung, None)))
    assert "scan_0_infection.nii.gz: stays next to the new masks" in caplog.text
    assert "scan_0_lung.nii.gz" not in caplog.text
