import math
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.data.cases import KNOWN_CASES
from resunet_jax.errors import InputError
from resunet_jax.metrics import METRICS
from resunet_jax.metrics.intervals import patient_interval
from resunet_jax.plots import Overlay
from resunet_jax.studies.published import PUBLISHED
from resunet_jax.studies.table import (
    load_slices,
    print_ablation,
    print_cross_validation,
    save_slices,
    summarize_folds,
    summarize_runs,
    to_markdown,
)


def record(seed: int, dice: dict[str, float | None], seconds: float = 1.0, train: str = "x") -> dict:
    """Of a run whose lung Dice is 0.9 everywhere, with the infection Dice of each case."""

    def volume(case: str, structure: str, value: float | None) -> dict:
        return {
            **dict.fromkeys(METRICS),
            "case": case,
            "patient": case.split("_", maxsplit=1)[0],
            "structure": structure,
            "dice": value,
            "nsd": value,
            "lesion_recall": None if structure == "lung" or value is None else value,
            "false_positive_lesions": None if structure == "lung" else 2.0,
        }

    cost = {"seconds_per_step": seconds, "parameters": 10, "step_gb": 0.5}
    return {
        "seed": seed,
        "split": {"train": [train], "val": [], "test": list(dice), "protocol": "few_shot, fold 0 of 5; by group"},
        "volumes": [
            volume(case, s, 0.9 if s == "lung" else dice[case]) for case in dice for s in ("lung", "infection")
        ],
        "settings": {"threshold": {"lung": 0.5}, "tolerance_mm": {"lung": 1.0, "infection": 3.0}, "protocol": ""},
        "cost": {"lung": cost, "infection": cost},
    }


def lung_alone(run: dict) -> dict:
    volumes = [row for row in run["volumes"] if row["structure"] == "lung"]
    return {**run, "cost": {"lung": run["cost"]["lung"]}, "volumes": volumes}


def test_variants_are_compared_volume_by_volume_and_seed_by_seed() -> None:
    """Volumes differ by more than variants do: unpaired, nothing could be told. Runs and volumes have any order."""
    first = [record(0, {"a_1": 0.1, "b_1": 0.9}), record(1, {"a_1": 0.2, "b_1": 0.8})]
    other = [record(1, {"b_1": 0.85, "a_1": 0.25}, 1.5), record(0, {"b_1": 0.95, "a_1": 0.15}, 1.5)]
    reference, row = summarize_runs({"first": first, "other": other})
    assert row["infection"]["mean"] == pytest.approx(0.55)
    assert row["infection"]["lowest"] == pytest.approx(0.2)
    assert row["infection"]["volumes"] == pytest.approx({"a_1": 0.2, "b_1": 0.9})
    for name in ("difference", "difference_low", "difference_high"):
        assert row["infection"][name] == pytest.approx(0.05)
    assert reference["infection"]["difference"] == 0
    # Of the means over seeds: seeds are no further patients.
    interval = row["infection"]["ci_low"], row["infection"]["ci_high"]
    assert interval == pytest.approx(patient_interval([0.2, 0.9], ["a", "b"]))
    assert row["lung"]["seconds_per_step"] == 1.5
    assert row["false_positive_lesions"] == 2
    assert row["lesion_recall"] == pytest.approx(0.55)


def test_a_case_that_several_splits_test_counts_in_each() -> None:
    first = [record(0, {"a_1": 0.1, "b_1": 0.3}, train="x"), record(0, {"a_1": 0.5, "b_1": 0.3}, train="y")]
    other = [record(0, {"a_1": 0.2, "b_1": 0.3}, train="x"), record(0, {"a_1": 0.8, "b_1": 0.3}, train="y")]
    reference, row = summarize_runs({"first": first, "other": other})
    assert reference["infection"]["mean"] == pytest.approx(0.3)
    assert row["infection"]["volumes"] == pytest.approx({"a_1": 0.5, "b_1": 0.3})
    assert row["infection"]["difference"] == pytest.approx(0.1)
    for run, val in zip(first, ("b", "c"), strict=True):  # of one training set too
        run["split"].update(train=["x"], val=[val])
    (row,) = summarize_runs({"only": first})
    assert row["infection"]["mean"] == pytest.approx(0.3)


def test_the_cost_is_the_median_of_the_runs() -> None:
    runs = [record(seed, {"a_1": 0.4, "b_1": 0.6}, seconds) for seed, seconds in enumerate((1.0, 1.2, 30.0))]
    (row,) = summarize_runs({"only": runs})
    assert row["lung"]["seconds_per_step"] == 1.2


def test_each_cell_of_the_table_has_its_own_number() -> None:
    other = record(0, {"a_1": 0.15, "b_1": 0.97})
    for volume in other["volumes"]:
        if volume["structure"] == "lung":
            volume["dice"] = 0.8 if volume["case"] == "a_1" else 0.9
    other["cost"] = {
        "lung": {"seconds_per_step": 2.0, "parameters": 1_500_000, "step_gb": 0.5},
        "infection": {"seconds_per_step": 0.25, "parameters": 2_000_000, "step_gb": 0.75},
    }
    rows = summarize_runs({"first": [record(0, {"a_1": 0.1, "b_1": 0.9})], "other": [other]})
    lung, infection = rows[1]["lung"], rows[1]["infection"]

    def interval(values: dict, name: str, form: str) -> str:
        return f"({values[f'{name}_low']:{form}} to {values[f'{name}_high']:{form}})"

    cells = (
        "other",
        "0.8500",
        "0.8000",
        f"-0.050 {interval(lung, 'difference', '+.3f')}",
        f"0.560 {interval(infection, 'ci', '.3f')}",
        f"+0.060 {interval(infection, 'difference', '+.3f')}",
        "0.56",
        "2.0",
        "2 + 0.25",
        "3.50 M",
        "0.75",
    )
    assert f"| {' | '.join(cells)} |" in to_markdown({"rows": rows}).splitlines()


def test_a_variant_may_have_the_lung_model_alone() -> None:
    both = [record(seed, {"a_1": 0.1, "b_1": 0.3}) for seed in (0, 1)]
    rows = summarize_runs({"both": both, "lung alone": [lung_alone(run) for run in both]})
    assert "infection" not in rows[1]
    assert rows[1]["lung"]["difference"] == 0
    table = to_markdown({"rows": rows})
    assert "| lung alone | 0.9000 | 0.9000 | +0.000 (+0.000 to +0.000) | – | – | – | – | 1 | 0.00 M | 0.50 |" in table
    assert "| lung | both | lung alone |\n| --- | --- | --- |\n| a_1 | 0.900 | 0.900 |" in table
    assert "| infection | both |\n| --- | --- |\n| a_1 | 0.100 |\n| b_1 | 0.300 |" in table


def test_mean_and_interval_are_of_the_same_volumes() -> None:
    """A case that is defined for one seed alone counts as one that is defined for both."""
    runs = [record(0, {"a_1": 0.8, "b_1": 0.82, "c_1": None}), record(1, {"a_1": 0.8, "b_1": 0.82, "c_1": 0.0})]
    (row,) = summarize_runs({"only": runs})
    assert row["infection"]["mean"] == pytest.approx(0.54)
    interval = row["infection"]["ci_low"], row["infection"]["ci_high"]
    assert interval == pytest.approx(patient_interval([0.8, 0.82, 0.0], ["a", "b", "c"]))


def test_where_nothing_is_defined_the_table_says_so() -> None:
    (row,) = summarize_runs({"only": [record(0, {"a_1": None, "b_1": None})]})
    assert math.isnan(row["infection"]["mean"])
    assert math.isnan(row["infection"]["lowest"])
    assert "nan" not in to_markdown({"rows": [row]})


def test_an_undefined_volume_is_left_out_of_both_variants() -> None:
    first = [record(seed, {"a_1": 0.1, "b_1": None, "c_1": 0.3}) for seed in (0, 1)]
    other = [record(0, {"a_1": 0.2, "b_1": 0.5, "c_1": 0.4}), record(1, {"a_1": 0.2, "b_1": None, "c_1": 0.4})]
    _, row = summarize_runs({"first": first, "other": other})
    assert row["infection"]["difference"] == pytest.approx(0.1)
    assert row["infection"]["difference_low"] == pytest.approx(0.1)


def test_one_seed_and_one_patient_have_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = summarize_runs({"only": [record(0, {"a_1": 0.4, "a_2": 0.6})]})
    assert math.isnan(row["infection"]["ci_low"])
    table = to_markdown({"rows": [row]})
    assert "| 0.500 | +0.000 |" in table
    assert "nan" not in table
    print_ablation({"rows": [row], "seeds": [0], "splits": ["few_shot"]})
    assert "only" in capsys.readouterr().out


def test_folds_stand_next_to_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(0, {"a_1": 0.4}), record(0, {"b_1": 0.6, "c_1": None})]
    for volume in records[0]["volumes"] + records[1]["volumes"]:
        volume["nsd"] = 0.2718
    results = summarize_folds(records, METRICS)
    assert [(row["fold"], row["case"]) for row in results["volumes"][::2]] == [(0, "a_1"), (1, "b_1"), (1, "c_1")]
    assert results["protocol"] == "few_shot, 5 folds; by group"
    assert results["summary"]["infection"]["dice"]["mean"] == pytest.approx(0.5)
    assert (results["cases"], results["full_set"]) == (2, False)
    assert results["settings"] == {"threshold": {"lung": 0.5}, "tolerance_mm": {"lung": 1.0, "infection": 3.0}}
    print_cross_validation(results)
    out = capsys.readouterr().out
    assert out.count("different data") == len([row for row in PUBLISHED if row.structure in ("lung", "infection")])
    assert "(NSD) at 1 mm, infection 3 mm" in out
    (line,) = [line for line in out.splitlines() if "this study" in line and "infection" in line]
    assert all(number in line for number in ("0.500", "0.141", "0.272", "2 of 3"))

    whole = {**records[0], "split": {**records[0]["split"], "train": KNOWN_CASES[:19], "test": KNOWN_CASES[19:]}}
    published = summarize_folds([whole], METRICS)["published"]
    assert published[0]["structure"] == "lung"
    assert {row["remark"] for row in published if row["protocol"] == "few_shot"} == {""}


def test_remarks_say_what_cannot_be_compared() -> None:
    ma = next(row for row in PUBLISHED if row.protocol == "five_fold" and row.structure == "infection")
    assert ma.remarks("five_fold", full_set=True) == ""
    assert ma.remarks("five_fold", full_set=False) == "different data"
    assert ma.remarks("patient_five_fold", full_set=True) == "different protocol"
    lungquant = next(row for row in PUBLISHED if row.source.startswith("LungQuant"))
    assert lungquant.remarks("five_fold", full_set=True) == "different data; different protocol"


def test_slices_come_back_as_they_were(tmp_path: Path, rng: np.random.Generator) -> None:
    def masks(shape: tuple[int, int]) -> dict:
        return {name: rng.random(shape) > 0.5 for name in ("lung", "infection")}

    slices = [
        (0.7, Overlay("a slice 3", rng.random((4, 5), np.float32), masks((4, 5)), masks((4, 5)))),
        (math.nan, Overlay("b slice 0", rng.random((6, 2), np.float32), masks((6, 2)), masks((6, 2)))),
    ]
    rows = save_slices(tmp_path / "slices.npz", slices)
    for (dice, ours), (loaded_dice, loaded) in zip(slices, load_slices(tmp_path / "slices.npz", rows), strict=True):
        np.testing.assert_equal(loaded_dice, dice)
        assert loaded.title == ours.title
        np.testing.assert_array_equal(loaded.image, ours.image)
        for old, new in ((ours.reference, loaded.reference), (ours.predicted, loaded.predicted)):
            assert list(old) == list(new)
            for name, mask in old.items():
                np.testing.assert_array_equal(new[name], mask)
    (tmp_path / "slices.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"slices\.npz: damaged .* the run is tested again"):
        load_slices(tmp_path / "slices.npz", rows)


def test_patients_that_a_model_had_seen_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [record(0, {"a_1": 0.1, "b_1": 0.9}), record(1, {"a_1": 0.2, "b_1": 0.8})]
    for run, seen in zip(runs, (["b"], ["b", "a"]), strict=True):
        run["settings"]["seen_patients"] = seen
    note = "Seen before by the models, so no test of new patients: "
    results = summarize_folds(runs, METRICS)
    print_cross_validation(results)
    assert f"{note}a, b\n" in capsys.readouterr().out
    summary = {"rows": summarize_runs({"one": runs}), "seeds": [0, 1], "splits": ["x"], "seen_patients": ["b"]}
    print_ablation(summary)
    assert f"{note}b\n" in capsys.readouterr().out
    assert to_markdown(summary).endswith(f"{note}b\n")
    for told in ({**summary, "seen_patients": []}, {k: v for k, v in summary.items() if k != "seen_patients"}):
        assert note not in to_markdown(told)
