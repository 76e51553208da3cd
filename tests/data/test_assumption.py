"""Scans in a window that only their owner knows: refused, unless `assumed` says what it is.

That each script hands it on: `tests/test_experiments.py`."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.config import Config, PreprocessConfig
from resunet_jax.data import slice_cache
from resunet_jax.data.cases import find_cases
from resunet_jax.data.intensity import parse_assumption
from resunet_jax.data.preprocess import air_offset
from resunet_jax.data.readers import read_volume
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.data.splits import SplitRequest
from resunet_jax.data.validate import check_data
from resunet_jax.errors import InputError
from resunet_jax.evaluation.evaluate import evaluate
from resunet_jax.recipes import ORIGINAL_BODY_THRESHOLDS
from resunet_jax.training.train import train
from tests.conftest import TINY, Trained, store_in_window

LOW, HIGH = -1000.0, 400.0
ASSUME = f"window:{LOW:g},{HIGH:g}"
ASSUMED = parse_assumption(ASSUME)
CONFIG = PreprocessConfig(image_size=32, normalization="window")
LEVEL = (HIGH - LOW) / 255 / 1500  # of such a scan, on the scale of the slices


@pytest.fixture(scope="module")
def exported(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom with its scans in Hounsfield units exported to 0..255 over [-1000, 400]; the others are left out."""
    folder = tmp_path_factory.mktemp("exported") / "data"
    shutil.copytree(phantom, folder)
    (folder / "metadata.csv").unlink()
    for path in folder.rglob("radiopaedia*"):
        path.unlink()
    store_in_window(folder / "ct_scans", LOW, HIGH)
    return folder


def test_slices_are_those_of_the_scan_in_hounsfield_units(exported: Path, phantom: Path, tmp_path: Path) -> None:
    cases = find_cases(exported)
    with pytest.raises(InputError, match=r"but not over HU \[-1250, 250\].*`assumed`"):
        prepare_cases(cases, CONFIG, tmp_path)
    originals = [case for case in find_cases(phantom) if case.source == "coronacases"]
    expected, found = (
        prepare_cases(group, CONFIG, tmp_path, assumed=assumed)
        for group, assumed in ((originals, None), (cases, ASSUMED))
    )
    for one, other in zip(expected, found, strict=True):
        inside = np.maximum(one.images, (LOW + 1250) / 1500)  # what is darker was clipped
        assert np.abs(inside - other.images).mean() < 1.5 * LEVEL
        np.testing.assert_array_equal(one.lung, other.lung)


def test_body_is_separated_as_in_other_scans_in_0_to_255(phantom: Path, tmp_path: Path) -> None:
    """By the recipe of the original, whose threshold depends on the scale; --assume=hu is the other scale."""
    config = PreprocessConfig(32, normalization="minmax", body_thresholds_minmax=ORIGINAL_BODY_THRESHOLDS)
    case = [case for case in find_cases(phantom) if case.source == "radiopaedia"][:1]
    plain, window, hu = (
        prepare_cases(case, config, tmp_path, assumed=assumption and parse_assumption(assumption))[0]
        for assumption in (None, "window:-1250,250", "hu")
    )
    np.testing.assert_array_equal(window.boxes, plain.boxes)
    np.testing.assert_array_equal(window.images, plain.images)
    assert not np.array_equal(hu.boxes, plain.boxes)


def test_air_is_not_moved_where_the_window_is_known(phantom: Path) -> None:
    ct = next(case.ct for case in find_cases(phantom) if case.source == "radiopaedia")
    volume = read_volume(ct, assumed=parse_assumption("window:-1350,150"))
    config = PreprocessConfig(normalization="air")
    assert air_offset(volume, config) == 0
    assert air_offset(dataclasses.replace(volume, intensity_scale="windowed"), config) != 0


def test_the_format_of_assumed_windows_is_theirs_alone(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only where the body is separated on the range of each slice."""
    original = dataclasses.replace(CONFIG, body_thresholds_minmax=ORIGINAL_BODY_THRESHOLDS)
    assumptions = [(CONFIG, ASSUMED), (original, None), (original, parse_assumption("hu")), (original, ASSUMED)]

    def digests() -> list[str]:
        case = find_cases(phantom)[:1]
        return [prepare_cases(case, config, tmp_path, assumed=assumed)[0].digest for config, assumed in assumptions]

    *others, window = digests()
    monkeypatch.setattr(slice_cache, "_ASSUMED_FORMAT", 0)
    assert digests()[:-1] == others
    assert digests()[-1] != window


def test_slices_of_another_assumption_are_not_taken(exported: Path, tmp_path: Path) -> None:
    case = find_cases(exported)[:1]
    assumptions = [ASSUMED, parse_assumption("window:-1000,300"), parse_assumption("hu")]
    prepared = [prepare_cases(case, CONFIG, tmp_path, assumed=assumed)[0] for assumed in assumptions]
    assert len({one.digest for one in prepared}) == 3
    assert not np.array_equal(prepared[0].images, prepared[1].images)


def test_a_training_under_another_assumption_is_not_resumed(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.lung, tmp_path / "lung")
    with pytest.raises(
        InputError, match=r"has changed since this run began, or `assumed` has, .*; restore it, or choose"
    ):
        train(
            Config(**TINY),
            trained.data,
            tmp_path / "lung",
            tmp_path / "cache",
            split=SplitRequest(trained.split_file),
            assumed=parse_assumption("hu"),
        )


def test_checks_and_evaluates_under_an_assumption(exported: Path, trained: Trained, tmp_path: Path) -> None:
    assert not check_data(exported).can_train
    check = check_data(exported, assumed=ASSUMED)
    assert check.can_train
    assert {fact.intensity_scale for fact in check.cases} == {"assumed"}
    assert all(-1000 <= fact.lung_hu <= -700 for fact in check.cases)
    dice = [
        evaluate(
            data, tmp_path / "cache", output_dir=tmp_path, lung_checkpoint=trained.lung, subset="all", assumed=assumed
        )
        for data, assumed in ((trained.data, None), (exported, ASSUMED))
    ]
    before, after = ({v["case"]: v["dice"] for v in one.volumes if v["structure"] == "lung"} for one in dice)
    for case_id, value in after.items():
        assert value == pytest.approx(before[case_id], abs=0.05)
