"""Numbers against closed-form volumes: lungs and infection that are boxes of known size and density."""

import dataclasses
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from resunet_jax.data.volume import Grid, Scan, Volume
from resunet_jax.inference.scan import SegmentedScan
from resunet_jax.report import numbers as module
from resunet_jax.report.numbers import Totals, implausible, iter_slices, measure, summary_line

ROWS, COLUMNS, SLICES = 60, 80, 12
SPACING = (4.0, 3.0, 5.0)
ML = 4.0 * 3.0 * 5.0 / 1000
PREDICTOR = SimpleNamespace(
    structures=(),
    fingerprints={},
    mask_thresholds={},
    infection_postprocess={"gate": "none"},
    min_component_fraction=0.1,
    reported_threshold=lambda structure: 0.4,
    record=None,
    interval_record=None,
    preprocess=SimpleNamespace(image_size=128, context_mm=5.0),
)


def box(rows: tuple[int, int], columns: tuple[int, int], slices: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((ROWS, COLUMNS, SLICES), bool)
    mask[slice(*rows), slice(*columns), slice(*slices)] = True
    return mask


RIGHT_LUNG = box((15, 45), (10, 30), (1, 10))
LEFT_LUNG = box((15, 45), (50, 70), (1, 10))
LUNGS = RIGHT_LUNG | LEFT_LUNG
GROUND_GLASS = box((20, 25), (10, 20), (1, 4))  # 150 voxels in the lower third of the right lung
CONSOLIDATION = box((30, 40), (60, 66), (7, 10))  # 180 voxels in the upper third of the left lung
OUTSIDE = box((50, 51), (40, 41), (5, 6))  # a voxel, less than a lesion


def segmented(
    lung: np.ndarray = LUNGS, infection: np.ndarray | None = None, hu: np.ndarray | None = None
) -> SegmentedScan:
    infection = GROUND_GLASS | CONSOLIDATION | OUTSIDE if infection is None else infection
    if hu is None:
        hu = np.where(lung, -850.0, 40.0)
        hu[0] = hu[-1] = -1000.0
        hu[48:52, 38:42] = 700.0  # the spine
        hu[GROUND_GLASS], hu[CONSOLIDATION], hu[OUTSIDE] = -600.0, 20.0, 20.0
    affine = np.array([[0, -SPACING[1], 0, 0], [-SPACING[0], 0, 0, 0], [0, 0, SPACING[2], 0], [0, 0, 0, 1.0]])
    grid = Grid(hu.shape, affine)
    assert grid.spacing_mm == SPACING
    scan = Scan(grid, lambda axis, start, stop: hu[..., start:stop], hu[..., 0].nbytes)
    masks = {"lung": lung, "infection": infection}
    return SegmentedScan(
        scan,
        PREDICTOR,
        {name: [np.packbits(mask[..., k]) for k in range(SLICES)] for name, mask in masks.items()},
        {name: mask.sum(axis=(0, 2)) for name, mask in masks.items()},
        np.tile(np.array([1, 2, ROWS - 2, COLUMNS - 4], np.int32), (SLICES, 1)),
        0.0,
    )


def totals_of(scan: SegmentedScan, lobes: np.ndarray | None = None) -> Totals:
    totals = Totals(scan)
    for slices in iter_slices(scan):
        some = slice(slices.start, slices.start + slices.hu.shape[-1])
        totals.add(slices, None if lobes is None else lobes[..., some])
    return totals


def report_of(scan: SegmentedScan, lobes: np.ndarray | None = None) -> dict:
    return measure(scan, totals_of(scan, lobes), {"name": "a", "file": "a.nii", "format": "nifti"}, 1.5)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_volumes_and_involvement(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("resunet_jax.inference.scan.NATIVE_CHUNK_SLICES", chunk)
    report = report_of(segmented())
    lung = 30 * 20 * 9  # voxels of each
    assert report["lung"] == pytest.approx(
        {"volume_ml": 2 * lung * ML, "left_ml": lung * ML, "right_ml": lung * ML}, rel=1e-12
    )
    infection = report["infection"]
    assert infection["volume_ml"] == pytest.approx(331 * ML)
    assert infection["ground_glass_ml"] == pytest.approx(150 * ML)
    assert infection["consolidation_ml"] == pytest.approx(181 * ML)
    assert infection["involvement_percent"] == pytest.approx(100 * 330 / (2 * lung))
    assert infection["mean_hu"] == pytest.approx((150 * -600 + 181 * 20) / 331)
    assert infection["lesion_volumes_ml"] == pytest.approx([10.8, 9.0])
    assert infection["lesions"] == 2
    assert report["grade"] == 1
    by_region = {name: values["percent"] for name, values in report["involvement"].items()}
    assert by_region == pytest.approx(
        {
            "both": 100 * 330 / (2 * lung),
            "left": 100 * 180 / lung,
            "right": 100 * 150 / lung,
            "upper": 100 * 180 / (2 * lung / 3),
            "middle": 0,
            "lower": 100 * 150 / (2 * lung / 3),
        }
    )
    for region, voxels, infected in (("both", 2 * lung, 330), ("left", lung, 180), ("right", lung, 150)):
        values = report["involvement"][region]
        assert (values["lung_ml"], values["infection_ml"]) == pytest.approx((voxels * ML, infected * ML))
    assert report["by_slice"]["infection_ml"][5] == pytest.approx(ML)
    assert sum(report["by_slice"]["lung_ml"]) == pytest.approx(2 * lung * ML)
    assert report["warnings"] == []
    assert not [note for note in report["notes"] if "outside" in note]
    assert summary_line(report) == "0.65 l lung, 3.1 % involved, 20 ml, grade 1, 2 s"


def test_the_threshold_itself_is_consolidation() -> None:
    hu = np.where(LUNGS, -850.0, 40.0)
    hu[GROUND_GLASS] = -300.0
    report = report_of(segmented(infection=GROUND_GLASS, hu=hu))
    assert report["infection"]["consolidation_ml"] == pytest.approx(150 * ML)


def test_the_grade_is_that_of_both_lungs() -> None:
    report = report_of(segmented(infection=box((15, 45), (10, 22), (1, 10))))
    assert report["infection"]["involvement_percent"] == pytest.approx(30)
    assert report["grade"] == report["involvement"]["both"]["grade"] == 3


def test_lobes_give_the_score_of_another_tools_mask() -> None:
    labels = np.where(RIGHT_LUNG, 1, 0) + np.where(LEFT_LUNG, 2, 0)
    labels[GROUND_GLASS] = 3
    report = report_of(segmented(), labels.astype(np.uint8))
    lobes = report["lobes"]
    assert {name: lobes[name]["grade"] for name in "123"} == {"1": 0, "2": 1, "3": 5}
    assert lobes["score"] == 6
    assert not report["warnings"]
    assert report_of(segmented())["lobes"] is None


@pytest.mark.parametrize("labels", [np.ones(LUNGS.shape, np.uint8), RIGHT_LUNG.astype(np.uint8)])
def test_lobes_that_are_not_of_these_lungs_are_warned_of(labels: np.ndarray) -> None:
    (warning,) = report_of(segmented(), labels)["warnings"]
    assert f"the lobes measure {labels.sum() * ML:.0f} ml, the lungs {LUNGS.sum() * ML:.0f} ml" in warning


def test_nothing_found_is_undefined_not_zero_percent() -> None:
    empty = np.zeros((ROWS, COLUMNS, SLICES), bool)
    report = report_of(segmented(empty, empty))
    assert report["infection"]["involvement_percent"] is None
    assert report["infection"]["mean_hu"] is None
    assert report["grade"] is None
    assert "no lung was found" in report["warnings"][0]
    assert summary_line(report) == "0.00 l lung, – % involved, 0 ml, grade –, 2 s"


def warnings_of(scan: SegmentedScan, ml: float = 2 * ML) -> str:
    return " ".join(implausible(totals_of(scan), ml, slice_mm=5.0))


def test_impossible_masks_are_warned_of_and_possible_ones_are_not() -> None:
    assert warnings_of(segmented()) == ""
    assert "324 ml, where 500 to 12000 ml" in warnings_of(segmented(), ML / 2)
    assert "plausible" in warnings_of(segmented(), 20 * ML)
    for slices in ((0, 10), (2, SLICES)):
        cut = box((15, 45), (10, 30), slices) | box((15, 45), (50, 70), slices)
        assert warnings_of(segmented(cut), ML / 2) == ""  # the field of view does not tell
    speck = segmented(box((30, 31), (20, 21), (0, SLICES)))  # in the first and the last slice too
    for warning in (warnings_of(speck), module.warnings_of(speck, totals_of(speck))[0]):
        assert "where 12 to 12000 ml are plausible" in warning
    dense = np.full((ROWS, COLUMNS, SLICES), 40.0)
    assert "denser than lung" in warnings_of(segmented(hu=dense))


def test_infection_is_warned_of_where_most_of_it_lies_outside_the_lungs() -> None:
    away = box((50, 55), (30, 45), (2, 9))  # 525 voxels
    for infection, percent in ((away, 100), (away | GROUND_GLASS, 78)):
        assert f"{percent} % of the infection lies outside" in warnings_of(segmented(infection=infection))
    some = GROUND_GLASS | CONSOLIDATION | box((50, 55), (38, 43), (5, 6))  # 25 of 355 voxels outside
    for infection in (some, OUTSIDE):
        assert warnings_of(segmented(infection=infection)) == ""


@pytest.mark.parametrize(("level", "is_dense"), [(-300.0, False), (-200.0, True)])
def test_lungs_are_dense_by_the_mean_of_what_is_healthy(level: float, is_dense: bool) -> None:
    hu = np.where(LUNGS, level, 40.0)
    for infection in (np.zeros_like(LUNGS), LUNGS & box((16, 45), (0, COLUMNS), (0, SLICES))):
        hu[infection] = 100.0
        assert ("denser than lung" in warnings_of(segmented(infection=infection, hu=hu))) == is_dense


@pytest.mark.parametrize(("level", "ml", "is_faint"), [(-660.0, 12, True), (-650.0, 12, False), (-660.0, 8, False)])
def test_infection_that_is_hardly_denser_than_lung_is_faint(level: float, ml: float, is_faint: bool) -> None:
    hu = np.where(LUNGS, -900.0, 40.0)
    hu[LUNGS & box((35, 45), (0, COLUMNS), (0, SLICES))] = -700.0  # a third of the lungs is less aerated
    infection = box((15, 25), (10, 30), (1, 7))
    hu[infection] = level
    scan = segmented(infection=infection | OUTSIDE, hu=hu)
    assert totals_of(scan).contrast_hu == level + 900
    assert (
        "the infection is faint (+240 HU against aerated lung)" in warnings_of(scan, ml / infection.sum())
    ) == is_faint


def test_contrast_is_undefined_without_infection_or_without_anything_else() -> None:
    for infection in (np.zeros_like(LUNGS), LUNGS, OUTSIDE):
        assert math.isnan(totals_of(segmented(infection=infection)).contrast_hu)


@pytest.mark.parametrize(("slices", "is_noted"), [((0, 9), True), ((2, SLICES), True), ((1, SLICES - 1), False)])
def test_lungs_that_reach_an_end_of_the_scan_are_noted(slices: tuple[int, int], is_noted: bool) -> None:
    notes = report_of(segmented(box((15, 45), (10, 30), slices)))["notes"]
    assert any("reach the end of the scan" in note for note in notes) == is_noted


def test_infection_outside_the_lungs_is_noted_and_a_trace_is_not_shown_as_0_ml() -> None:
    around = box((15, 55), (10, 30), (2, 9))
    report = report_of(segmented(infection=around))
    (note,) = [note for note in report["notes"] if "outside" in note]
    infection, involvement = report["infection"], report["involvement"]["both"]
    assert note.startswith(
        f"{infection['volume_ml'] - involvement['infection_ml']:.0f} ml of the infection lie outside"
    )
    report = report_of(segmented(infection=box((20, 21), (15, 17), (5, 6))))
    assert summary_line(report).split(", ")[2] == "0.12 ml"


def with_spine(rows: slice, lung: np.ndarray = LUNGS, value: float = 700.0) -> SegmentedScan:
    hu = np.where(lung, -850.0, 40.0)
    hu[rows, 36:44] = value
    return segmented(lung, np.zeros_like(lung), hu)


def test_exchanged_front_and_back_are_told_by_the_spine_and_by_the_ends_of_the_lungs() -> None:
    behind, in_front = with_spine(slice(48, 55)), with_spine(slice(3, 10))
    no_lung = dataclasses.replace(in_front, packed={"infection": in_front.packed["infection"]})
    assert module.warnings_of(no_lung, totals_of(no_lung)) == []  # of an infection model alone
    assert totals_of(behind).orientation_score == 1
    assert module.warnings_of(behind, totals_of(behind)) == []
    assert totals_of(in_front).orientation_score == -1
    assert "front and back seem to be exchanged" in module.warnings_of(in_front, totals_of(in_front))[0]
    for between in (
        with_spine(slice(28, 35)),
        with_spine(slice(3, 10), value=3071),
        with_spine(slice(3, 10), value=40),
        with_spine(slice(3, 4)),
    ):
        assert totals_of(between).orientation_score == 0  # contrast agent, metal, a window without bone, little bone
    ends = box((35, 45), (10, 70), (1, 3)) | box((15, 45), (10, 70), (3, 8)) | box((35, 45), (10, 70), (8, 10))
    row, voxels = np.arange(ROWS), ends.sum(axis=(1, 2))
    centroid = row @ voxels / voxels.sum()
    spread = np.sqrt((row - centroid) ** 2 @ voxels / voxels.sum())
    assert totals_of(with_spine(slice(0), ends)).orientation_score == pytest.approx((39.5 - centroid) / spread)
    assert totals_of(with_spine(slice(0), ends[::-1])).orientation_score == pytest.approx((centroid - 39.5) / spread)


def test_bone_at_the_sides_and_lungs_of_one_row_tell_nothing_of_front_and_back() -> None:
    hu = np.where(LUNGS, -850.0, 40.0)
    hu[3:10, 2:20] = hu[3:10, 60:78] = 700.0
    assert totals_of(segmented(hu=hu)).orientation_score == 0
    assert totals_of(segmented(box((30, 31), (20, 60), (1, 10)))).orientation_score == 0


def test_a_little_that_speaks_against_the_header_is_not_warned_of() -> None:
    hu = np.where(LUNGS, -850.0, 40.0)
    hu[46:55, 36:44] = hu[2:12, 36:44] = 700.0
    scan = segmented(infection=np.zeros_like(LUNGS), hu=hu)
    assert totals_of(scan).orientation_score == pytest.approx(-1 / 19)
    assert module.warnings_of(scan, totals_of(scan)) == []


def test_a_structure_without_a_model_is_empty() -> None:
    scan = segmented()
    alone = SegmentedScan(scan.scan, PREDICTOR, {"lung": scan.packed["lung"]}, scan.profiles, scan.boxes, 0.0)
    assert not any(slices.infection.any() for slices in iter_slices(alone))
    assert module.DISCLAIMER.startswith("A research tool")


def test_hounsfield_units_of_any_scale() -> None:
    values = np.array([[[0.0, 51.0, 255.0]]])
    grid = Grid((1, 1, 3), np.eye(4))
    np.testing.assert_allclose(Volume(values, "windowed", grid).to_hu()[0, 0], [-1250, -950, 250], atol=1e-3)
    np.testing.assert_allclose(Volume(values, "windowed", grid).to_hu(0.1)[0, 0], [-1100, -800, 400], atol=1e-3)
    np.testing.assert_array_equal(Volume(values, "hu", grid).to_hu()[0, 0], [0, 51, 255])
    assumed = Volume(values, "windowed", grid, (-10.0, 90.0))
    np.testing.assert_allclose(assumed.to_hu()[0, 0, 0], -1250 + 150, atol=1e-3)


def record(guarantee: float | None, level: float = 0.9) -> SimpleNamespace:
    return SimpleNamespace(
        level=level,
        guarantee=guarantee,
        method="a method",
        patients=11,
        temperature=2.0,
        interval=lambda name, value: (value / 2, value * 2),
    )


def test_intervals_and_what_they_are_worth_go_into_the_report() -> None:
    scan = segmented()

    def report(**changes: object) -> dict:
        predictor = SimpleNamespace(**{**vars(PREDICTOR), **changes})
        return report_of(dataclasses.replace(scan, predictor=predictor))

    for one, words in (
        (record(0.9), "held-out patients; each is right for 90 %"),
        (record(None), "without a guarantee"),
    ):
        found = report(record=one, interval_record=one)
        infection = found["infection"]
        assert infection["volume_interval_ml"] == [infection["volume_ml"] / 2, infection["volume_ml"] * 2]
        assert infection["involvement_interval_percent"][1] == 2 * infection["involvement_percent"]
        assert found["uncertainty"] == {
            "interval": {"level": 0.9, "guarantee": one.guarantee, "method": "a method", "patients": 11},
            "temperature": 2.0,
            "probability_threshold": 0.4,
            "members": None,
            "pairwise_dice": None,
        }
        assert words in found["notes"][-1]
    for changes, words in (
        ({"record": record(0.9)}, "calibrated with other thresholds"),
        ({}, "were not calibrated"),
    ):
        found = report(**changes)
        assert found["infection"]["volume_interval_ml"] is None
        assert found["uncertainty"]["interval"] is None
        assert words in found["notes"][-1]


def test_without_lung_there_is_no_interval() -> None:
    models = {"record": record(0.9), "interval_record": record(0.9)}
    scan = segmented(lung=np.zeros_like(LUNGS), infection=np.zeros_like(LUNGS))
    infection = report_of(dataclasses.replace(scan, predictor=SimpleNamespace(**{**vars(PREDICTOR), **models})))
    assert infection["infection"]["volume_interval_ml"] is None
    assert infection["infection"]["involvement_interval_percent"] is None


@pytest.mark.parametrize(("dice", "reported"), [(0.8, 0.8), (math.nan, None)])
def test_agreement_of_members_goes_into_the_report(dice: float, reported: float | None) -> None:
    members = SimpleNamespace(members=4, pairwise_dice=dice, packed=[zlib.compress(bytes(ROWS * COLUMNS))] * SLICES)
    uncertainty = report_of(dataclasses.replace(segmented(), uncertainty=members))["uncertainty"]
    assert (uncertainty["members"], uncertainty["pairwise_dice"]) == (4, reported)


def test_settings_tell_what_the_values_of_the_scan_are() -> None:
    scan = segmented()
    stored = dataclasses.replace(scan.scan, stored_window=(-1300.0, 260.0))
    assert report_of(scan)["settings"]["intensity_scale"] == "hu"
    assert report_of(dataclasses.replace(scan, scan=stored))["settings"]["intensity_scale"] == [-1300.0, 260.0]
    assert report_of(dataclasses.replace(scan, offset=0.1))["settings"]["air_offset_hu"] == 150


@pytest.mark.parametrize(("offset", "shift"), [(0.0, ""), (-0.1, ", shifted by -150 HU to air at -1000 HU")])
def test_a_window_that_is_assumed_is_told(offset: float, shift: str) -> None:
    scan = segmented()
    windowed = dataclasses.replace(scan, scan=dataclasses.replace(scan.scan, intensity_scale="windowed"), offset=offset)
    note = f"Stored in 0..255 without its window: HU [-1250, 250] is assumed{shift}, and what is denser is cut off."
    assert note in report_of(windowed)["notes"]
    measured = dataclasses.replace(windowed, scan=dataclasses.replace(windowed.scan, stored_window=(-1300.0, 260.0)))
    for other in (scan, measured):
        assert not any("window" in note for note in report_of(other)["notes"])
