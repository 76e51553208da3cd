"""A phantom as DICOM and as NIfTI: the same masks, voxel for voxel, and a page for each."""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax import Predictor, load_predictor
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import READERS, find_sources, open_scan, read_grid, read_mask
from resunet_jax.data.volume import Grid
from resunet_jax.inference.batch import segment_scans
from resunet_jax.report.outputs import make_outputs
from tests.conftest import Trained, write_nifti
from tests.dicom_files import SPACING, pack, write_series


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


@pytest.mark.parametrize("step", [(0.0, 0.0, 5.0), (0.0, 1.3, 5.0)], ids=["straight", "tilted"])
def test_masks_are_those_of_the_same_volume_as_nifti(
    trained: Trained, predictor: Predictor, tmp_path: Path, step: tuple[float, ...]
) -> None:
    hu = hounsfield_units(trained)
    write_series(tmp_path / "dicom", hu, step=step)
    archive = pack(tmp_path / "dicom", tmp_path / "zipped.zip")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (-SPACING[1], 0, 0), (0, -SPACING[0], 0), np.array(step) * (-1, -1, 1)
    affine[:3, 3] = (20, 30, 100)
    grid = Grid((hu.shape[1], hu.shape[0], hu.shape[2]), affine)
    write_nifti(tmp_path / "plain.nii.gz", hu.astype(np.int16), grid)

    sources = [find_sources(path)[0] for path in (tmp_path / "plain.nii.gz", tmp_path / "dicom", archive)]
    outputs = make_outputs(dicom_seg=False)
    results = list(segment_scans(sources, tmp_path / "out", predictor, outputs=outputs))
    assert [result.error for result in results] == [None] * 3
    for structure in ("lung", "infection"):
        masks = [nib.load(tmp_path / "out" / f"{source.name}_{structure}.nii.gz") for source in sources]
        plain, *others = (np.asarray(mask.dataobj) for mask in masks)
        for other, mask in zip(others, masks[1:], strict=True):
            np.testing.assert_array_equal(other, plain)
            np.testing.assert_allclose(mask.affine, masks[0].affine, atol=1e-5)
    assert all((tmp_path / "out" / f"{source.name}_report.html").is_file() for source in sources)


def hounsfield_units(trained: Trained) -> np.ndarray:
    """Of a scan of the phantom, int (rows, columns, slices)."""
    with open_scan(next((trained.data / "ct_scans").glob("coronacases*"))) as scan:
        return scan.read_slices(0, scan.grid.oriented_shape[-1]).values.astype(int)


def test_a_series_in_which_nothing_is_found_is_finished_without_dicom_seg(
    trained: Trained, predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("highdicom")
    write_series(tmp_path / "scan", hounsfield_units(trained))
    empty = dataclasses.replace(predictor, thresholds={"lung": 0.9999, "infection": 0.9999})
    outputs = make_outputs(report=False, dicom_seg=True)
    for expected in (False, True):
        (result,) = segment_scans(find_sources(tmp_path / "scan"), tmp_path / "out", empty, outputs=outputs)
        assert (result.error, result.skipped, result.others) == (None, expected, [])
    assert "nothing was found, and a DICOM-SEG cannot be empty" in caplog.text
    assert not list((tmp_path / "out").glob("*_seg.dcm"))


def test_a_data_set_of_dicom_folders_and_nifti_masks(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 100, (40, 36, 6))
    hu[10:30, 10:26] = 40
    for name in ("a", "b"):
        write_series(tmp_path / "ct_scans" / name, hu, uid="")
        (source,) = find_sources(tmp_path / "ct_scans" / name)
        with READERS["dicom"].open(source) as scan:
            grid = scan.grid
        for folder in ("lung_mask", "infection_mask"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_nifti(tmp_path / folder / f"{name}.nii.gz", (hu > 0).astype(np.uint8), grid)
    cases = find_cases(tmp_path)
    assert [case.id for case in cases] == ["a", "b"]
    for case in cases:
        assert read_grid(case.ct).shape == (36, 40, 6)
        np.testing.assert_array_equal(read_mask(case.lung_mask, case.ct, read_grid(case.ct)), hu > 0)
