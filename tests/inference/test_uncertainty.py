"""Members against masks of known overlap, maps and reported probabilities against masks, memory by chunks."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax import Predictor, load_predictor, save_model, segment_scan
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import prepare_volume
from resunet_jax.data.readers import read_volume
from resunet_jax.errors import InputError
from resunet_jax.inference import scan as module
from resunet_jax.inference import uncertainty as members
from resunet_jax.inference.predictor import NativeSlices
from resunet_jax.inference.uncertainty import MEMBERS, Member, compare_members, mean_pairwise_dice, uncertainty_map
from resunet_jax.metrics.calibration import apply_temperature
from resunet_jax.metrics.conformal import QUANTITIES
from resunet_jax.weights.store import fingerprint
from resunet_jax.weights.uncertainty import UNCERTAINTY_FILE, UncertaintyRecord, load_record, parse_record, save_record
from tests.conftest import Trained, with_averaging


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


@pytest.fixture(scope="module")
def scan(trained: Trained) -> Path:
    return find_cases(trained.data)[0].ct


LOW = 0.2
"""A threshold at which the tiny models find something."""


def record_of(predictor: Predictor, **changes: object) -> UncertaintyRecord:
    models = {"lung": predictor.lung, "infection": predictor.infection}
    values = {
        "fingerprints": {name: fingerprint(model.variables) for name, model in models.items()},
        "temperature": 2.0,
        "calibration": {"ece": 0.1, "ece_calibrated": 0.05, "brier": 0.1, "brier_calibrated": 0.09},
        "method": "split_conformal",
        "residuals": {name: [0.5 * k for k in range(1, 10)] for name in QUANTITIES},
        "settings": predictor.mask_settings,
        "source": "9 held-out patients",
    }
    return UncertaintyRecord(**{**values, **changes})


def data(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_pairwise_dice_in_closed_form() -> None:
    a, b, empty = (np.packbits(np.array([bits], bool), axis=1) for bits in ([1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]))
    one = np.ones(1)
    assert mean_pairwise_dice([a, b], one) == 0.5
    assert mean_pairwise_dice([a, a, b], one) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert mean_pairwise_dice([a, empty], one) == 0
    assert np.isnan(mean_pairwise_dice([empty, empty], one))
    stacked = [np.concatenate(pair) for pair in ((a, a), (a, b))]  # equal in one slice, half so in the other
    assert mean_pairwise_dice(stacked, np.array([3.0, 1.0])) == pytest.approx(2 * (3 * 2 + 1) / (4 * (3 + 1)))


@pytest.mark.parametrize("member", [*MEMBERS[1:], Member(True, 3, -2)])
def test_a_member_is_undone_but_for_its_margin(member: Member) -> None:
    slices = np.random.default_rng(0).random((3, 32, 32), np.float32)
    again = member.undo(member.apply(slices))
    inside = np.s_[:, 4:-4, 4:-4]
    np.testing.assert_array_equal(again[inside], slices[inside])
    assert not np.array_equal(member.apply(slices)[inside], slices[inside])


def test_members_are_the_cascade_on_each_view(predictor: Predictor, scan: Path) -> None:
    predictor = dataclasses.replace(predictor, thresholds={"infection": LOW})
    volume = read_volume(scan)
    images, boxes = prepare_volume(volume, predictor.preprocess)
    mean, dice = compare_members(predictor, images, boxes, volume.grid)
    members = []
    for view in MEMBERS:
        probabilities = {
            name: view.undo(p).copy() for name, p in predictor.slice_probabilities(view.apply(images)).items()
        }
        predictor.postprocess(probabilities, boxes, volume.grid)
        members.append(probabilities["infection"])
    np.testing.assert_array_equal(members[0], predictor.scan_probabilities(images, boxes, volume.grid)["infection"])
    np.testing.assert_allclose(mean, np.mean(members, axis=0), atol=1e-6)
    assert 0 < dice < 1
    alone, undefined = compare_members(predictor, images, boxes, volume.grid, members=MEMBERS[:1])
    assert np.isnan(undefined)
    np.testing.assert_array_equal(alone, members[0])


def test_members_see_their_view_alone(predictor: Predictor, scan: Path) -> None:
    averaged = dataclasses.replace(
        predictor, lung=with_averaging(predictor.lung), infection=with_averaging(predictor.infection)
    )
    volume = read_volume(scan)
    images, boxes = prepare_volume(volume, predictor.preprocess)
    one, other = (compare_members(pair, images, boxes, volume.grid) for pair in (predictor, averaged))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1] or np.isnan(one[1])
    assert predictor.without_averaging is predictor
    assert averaged.without_averaging is averaged.without_averaging  # compiled once for all scans


def test_entropy_in_hundredths_of_a_bit() -> None:
    p = np.linspace(0, 1, 101, dtype=np.float32)
    expected = uncertainty_map(p)
    np.testing.assert_array_equal(expected, expected[::-1])
    assert (np.diff(expected[:51].astype(int)) >= 0).all()
    assert uncertainty_map(np.float32([0, 0.11002786, 0.25, 0.5, 1])).tolist() == [0, 50, 81, 100, 0]


def test_the_map_lies_on_the_scans_grid_and_changes_no_mask(
    predictor: Predictor, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = segment_scan(scan, tmp_path / "plain", predictor)
    written = segment_scan(scan, tmp_path / "whole", predictor, uncertainty=True)
    assert [path.name for path in written] == [
        *(path.name for path in plain),
        plain[0].name.replace("lung", "uncertainty"),
    ]
    for a, b in zip(plain, written, strict=False):
        assert a.read_bytes() == b.read_bytes()
    found, original = nib.load(written[-1]), nib.load(scan)
    assert (found.get_data_dtype(), found.shape) == (np.uint8, original.shape)
    assert found.affine.tobytes() == original.affine.tobytes()
    assert 0 < data(written[-1]).max() <= 100
    for chunked in (module, members):
        monkeypatch.setattr(chunked, "CHUNK_SLICES", 5)
    for a, b in zip(written, segment_scan(scan, tmp_path / "chunks", predictor, uncertainty=True), strict=True):
        np.testing.assert_array_equal(data(a), data(b))


@pytest.mark.parametrize("threshold", [0.5, LOW])
def test_masks_are_the_same_at_the_mapped_threshold(
    predictor: Predictor, scan: Path, tmp_path: Path, threshold: float
) -> None:
    """A temperature changes the infection's reported probability, and neither a mask nor the lung's probability."""
    plain = dataclasses.replace(predictor, thresholds={"infection": threshold})
    calibrated = dataclasses.replace(plain, record=record_of(predictor))
    before = segment_scan(scan, tmp_path / "plain", plain, save_probabilities=True)
    after = segment_scan(scan, tmp_path / "calibrated", calibrated, save_probabilities=True)
    for a, b in zip(before[:3], after[:3], strict=True):  # lung, its probability, infection
        assert a.read_bytes() == b.read_bytes()
    raw, reported = data(before[3]), data(after[3])
    np.testing.assert_allclose(reported, apply_temperature(raw, 2.0), atol=1e-6)
    assert np.abs(reported - raw).max() > 0.05
    mapped = calibrated.reported_threshold("infection")
    assert (mapped == 0.5) == (threshold == 0.5)
    mask = data(after[2]) > 0
    assert mask.any() == (threshold == LOW)
    np.testing.assert_array_equal(reported > mapped, mask)
    np.testing.assert_array_equal(raw > threshold, mask)


def test_rounding_moves_nothing_over_the_threshold(predictor: Predictor) -> None:
    for threshold, temperature in ((0.5, 19.0), (0.35, 19.0), (0.999, 0.3), (0.9, 0.1)):  # the last two end at 1
        p = np.float32([np.nextafter(np.float32(threshold), np.float32(k)) for k in (0, 1)] + [threshold, 0, 1])
        native = NativeSlices(p.reshape(1, 1, -1), (p > threshold).reshape(1, 1, -1))
        calibrated = dataclasses.replace(
            predictor, thresholds={"infection": threshold}, record=record_of(predictor, temperature=temperature)
        )
        reported = calibrated.reported_probability("infection", native)
        np.testing.assert_array_equal(reported > calibrated.reported_threshold("infection"), native.mask)
        assert calibrated.reported_probability("lung", native) is native.probability


def test_without_an_infection_model_it_is_refused(trained: Trained, scan: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`uncertainty`"):
        segment_scan(scan, tmp_path, load_predictor(trained.lung), uncertainty=True)
    assert not list(tmp_path.iterdir())


def test_a_record_is_read_back_and_bound_to_its_models(
    predictor: Predictor, tmp_path: Path, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    record = record_of(predictor)
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record
    assert load_record(tmp_path / "none") is None
    assert (record.patients, record.level, record.guarantee) == (9, 0.9, 0.9)
    assert record.interval("infection_ml", 100.0) == pytest.approx((5.5**2, 14.5**2))
    estimate = record_of(predictor, method="fold_residuals")
    assert estimate.guarantee is None
    # Next to the model it is found; of other weights, it is named and left out.
    folder = tmp_path / "infection"
    save_model(folder, predictor.infection.variables, predictor.infection.config)
    assert load_predictor(trained.lung, folder).record is None
    save_record(folder, record)
    found = load_predictor(trained.lung, folder)
    assert found.record == record == found.interval_record
    assert load_predictor(trained.lung, folder, infection_postprocess={"min_lesion_ml": 2.0}).interval_record is None
    save_record(folder, record_of(predictor, fingerprints={"lung": "0", "infection": "1"}))
    assert load_predictor(trained.lung, folder).record is None
    assert "made for other weights" in caplog.text


def test_a_record_of_0_13_0_is_of_masks_that_kept_no_lesion_for_its_volume(predictor: Predictor) -> None:
    record = record_of(predictor)
    values = json.loads(record.to_json())
    postprocess = values["settings"]["infection_postprocess"]
    assert postprocess.pop("keep_lesion_ml") == 20.0
    del values["patient_ids"]  # of 0.18.3 and before
    found = parse_record(json.dumps(values), "here")
    assert found.settings["infection_postprocess"] == {**postprocess, "keep_lesion_ml": 0.0}
    assert found.patient_ids == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"temperature": None},
        {"temperature": 1e-300},
        {"temperature": 10**400},
        {"residuals": {name: [] for name in QUANTITIES}},
        {"residuals": {"infection_ml": [1.0]}},
        {"residuals": {name: [-1.0] for name in QUANTITIES}},
        {"method": "guess"},
        {"patient_ids": "abc"},
        {"patient_ids": [1]},
    ],
)
def test_a_senseless_record_is_named(predictor: Predictor, tmp_path: Path, changes: dict) -> None:
    values = {**json.loads(record_of(predictor).to_json()), **changes}
    (tmp_path / UNCERTAINTY_FILE).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"uncertainty\.json: no record"):
        load_record(tmp_path)
    with pytest.raises(InputError, match="here: no record"):
        parse_record("{", "here")
