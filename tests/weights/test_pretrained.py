"""The shipped pair: its files, its masks of a generated scan, and how it is written."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from resunet_jax import load_predictor, load_pretrained, segment_scan, segment_volume
from resunet_jax.data.cases import find_cases
from resunet_jax.data.phantom import PhantomConfig, make_phantom
from resunet_jax.errors import InputError
from resunet_jax.inference.predictor import Predictor
from resunet_jax.weights.pretrained import (
    MODEL_CARD,
    ModelPair,
    load_pair,
    load_pair_record,
    pretrained_folder,
    save_as_models,
    save_pair,
)
from resunet_jax.weights.store import load_model
from resunet_jax.weights.uncertainty import save_record
from tests.conftest import REFERENCE

MASKS = REFERENCE / "pretrained_masks.npz"
"""Packed masks of the scan below by the shipped pair: made by `make_reference`, anew when masks change."""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrained") / "phantom"
    make_phantom(root, PhantomConfig(volumes=2, slices=12, downsample=2))
    return find_cases(root)[0].ct


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return load_pretrained()


@pytest.fixture(scope="module")
def written(scan: Path, predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    paths = segment_scan(scan, tmp_path_factory.mktemp("masks"), predictor)
    return {name: np.asarray(nib.load(path).dataobj) for name, path in zip(("lung", "infection"), paths, strict=True)}


def make_reference(written: dict[str, np.ndarray]) -> None:
    np.savez_compressed(MASKS, **{name: np.packbits(mask > 0) for name, mask in written.items()})


def test_files_are_those_that_were_shipped() -> None:
    folder = Path(str(pretrained_folder()))
    digests = json.loads((folder / "files.json").read_text())
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {*digests, "files.json", MODEL_CARD}
    for name, digest in digests.items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert b"/work" not in content
        assert b"/tmp" not in content
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 10e6


def test_its_record_is_of_its_weights_and_promises_nothing(predictor: Predictor) -> None:
    """It saw all of the patients, so what its intervals are made from are the errors of models of five folds."""
    record = predictor.record
    assert record is not None
    assert record == predictor.interval_record == load_pair_record()
    assert (record.method, record.patients, record.guarantee) == ("fold_residuals", 5, None)
    assert record.calibration["ece_calibrated"] < record.calibration["ece"]
    assert record.calibration["brier_calibrated"] < record.calibration["brier"]


def test_masks_of_a_generated_scan_are_the_stored_ones(written: dict[str, np.ndarray]) -> None:
    stored = np.load(MASKS)
    for name, mask in written.items():
        expected = np.unpackbits(stored[name], count=mask.size).reshape(mask.shape).astype(bool)
        assert expected.any()
        overlap = 2 * np.count_nonzero((mask > 0) & expected) / (np.count_nonzero(mask) + np.count_nonzero(expected))
        assert overlap >= 0.999


def test_a_scan_in_memory_gives_the_masks_and_numbers_of_its_file(
    scan: Path, predictor: Predictor, written: dict[str, np.ndarray]
) -> None:
    image = nib.load(scan)
    result = segment_volume(np.asarray(image.dataobj), image.affine, predictor)
    np.testing.assert_array_equal(result.lung > 0, written["lung"] > 0)
    np.testing.assert_array_equal(result.infection, written["infection"] > 0)
    ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    assert result.report["lung"]["volume_ml"] == pytest.approx(np.count_nonzero(written["lung"]) * ml, rel=1e-6)
    assert result.report["infection"]["volume_ml"] == pytest.approx(
        np.count_nonzero(written["infection"]) * ml, rel=1e-6
    )


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4, 4), np.eye(4), "`hu`"),
        ((0, 4, 4), np.eye(4), "`hu`"),
        ((4, 4, 4), np.eye(3), "`affine`"),
        ((4, 4, 4), np.zeros((4, 4)), "`affine`"),
        ((4, 4, 4), np.array([[1, 1 + 1e-9, 0, 0], [1, 1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]]), "`affine`"),
        ((4, 4, 4), np.eye(4), "every voxel is 0"),
    ],
)
def test_bad_arrays_are_refused(predictor: Predictor, shape: tuple[int, ...], affine: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        segment_volume(np.zeros(shape), affine, predictor)


def test_a_pair_is_written_the_same_twice_and_read_back(tmp_path: Path) -> None:
    pair = load_pair()
    for name in ("a", "b"):
        save_pair(tmp_path / name, pair, load_pair_record())
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    for loaded, again in zip(pair, load_pair(tmp_path / "a"), strict=True):
        assert loaded.config == again.config
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, again.variables)
    assert load_pair_record(tmp_path / "a") == load_pair_record()
    with pytest.raises(InputError, match="exists already"):
        save_pair(tmp_path / "a", ModelPair(*pair))
    save_pair(tmp_path / "without", pair)
    assert load_pair_record(tmp_path / "without") is None


@pytest.mark.parametrize("name", ["lung/variables.msgpack", "infection/config.json", "files.json"])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pair"
    shutil.copytree(str(pretrained_folder()), folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="install the package again"):
        load_pair(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="install the package again"):
        load_pair(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "5", '{"lung/config.json": "0"}'])
def test_digests_that_are_none_are_named(tmp_path: Path, text: str) -> None:
    shutil.copytree(str(pretrained_folder()), tmp_path / "pair")
    (tmp_path / "pair" / "files.json").write_text(text)
    with pytest.raises(InputError, match=r"the shipped models are incomplete .*; install the package again"):
        load_pair(tmp_path / "pair")


def test_the_pair_as_saved_models_gives_the_same(tmp_path: Path) -> None:
    save_as_models(tmp_path / "models", load_pair(), load_pair_record())
    predictor = load_predictor(tmp_path / "models" / "lung", tmp_path / "models" / "infection")
    shipped = load_pretrained()
    assert predictor.fingerprints == shipped.fingerprints
    assert [model.config for model in predictor.models.values()] == [m.config for m in shipped.models.values()]
    assert predictor.record == shipped.record is not None
    infection = tmp_path / "models" / "infection"
    save_record(infection, dataclasses.replace(shipped.record, source="calibrated anew"))
    assert load_predictor(tmp_path / "models" / "lung", infection).record.source == "calibrated anew"
    digests = json.loads((infection / "files.json").read_text())
    (infection / "files.json").write_text(json.dumps({**digests, "uncertainty.json": "0"}))  # as by 0.19.0
    load_model(infection)
    (infection / "uncertainty.json").unlink()
    assert load_predictor(tmp_path / "models" / "lung", infection).record is None
    with pytest.raises(InputError, match="models: exists already; choose a new folder"):
        save_as_models(tmp_path / "models", load_pair())
