import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.config import Config
from resunet_jax.data.splits import Split, SplitRequest, read_split
from resunet_jax.errors import InputError, StoppedError
from resunet_jax.evaluation import ablation as module
from resunet_jax.evaluation.ablation import ROWS, Row, Run, ablate, configs, find_rows
from resunet_jax.evaluation.ablation_table import print_ablation, summarize_runs, to_markdown
from resunet_jax.files import locked
from resunet_jax.recipes import RECIPES, recipe
from resunet_jax.training.fit import never
from tests.conftest import KilledError, Trained, kill_at

CHANGES = {
    "preprocess.image_size": 32,
    "model.filters": [4, 8, 16, 32],
    "train.epochs": 1,
    "train.batch_size": 4,
}
LUNG_ALIKE = [
    Row("robust"),
    Row("other infection", infection={"train.loss": "bce"}),
    Row("largest region alone", lung={"predict.smallest_region": 1.0}, infection=None),
]


@pytest.mark.slow
def test_goes_on_after_a_kill_beside_another_process_and_trains_a_shared_lung_model_once(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split_file = tmp_path / "split.json"
    split_file.write_text('{"train": ["coronacases_001", "coronacases_002"], "val": [], "test": ["coronacases_003"]}')
    trained_folders = kill_at(monkeypatch, module, call=3)

    def run(should_stop: Callable[[int], bool] = never) -> dict:
        return ablate(
            LUNG_ALIKE,
            trained.data,
            tmp_path / "run",
            trained.cache,
            changes=CHANGES,
            seeds=[3],
            splits=[SplitRequest(split_file)],
            should_stop=should_stop,
        )

    with pytest.raises(KilledError):
        run()
    first_line = (tmp_path / "run" / "runs.jsonl").read_text()
    other = LUNG_ALIKE[1]
    elsewhere = Run(other, 3, SplitRequest(split_file), read_split(split_file), configs(other, CHANGES, 3)).key
    with locked(tmp_path / "run" / ".running" / elsewhere), pytest.raises(StoppedError, match="goes on from there"):
        run(should_stop=lambda step: step == 0)  # where nothing is left but to wait for the other process
    lines = (tmp_path / "run" / "runs.jsonl").read_text()
    assert lines.startswith(first_line)
    assert len(lines.splitlines()) == 2
    summary = run()
    lines = (tmp_path / "run" / "runs.jsonl").read_text()
    assert lines.startswith(first_line)
    assert [folder.parent.name for folder in trained_folders] == ["lung", "infection", "infection"]
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["row"] for record in records] == ["robust", "largest region alone", "other infection"]
    assert {record["seed"] for record in records} == {3}
    assert len({record["folders"]["lung"] for record in records}) == 1
    assert {row["case"] for row in records[0]["volumes"]} == {"coronacases_003"}
    reports = [tmp_path / "run" / "reports" / record["key"] / "metrics.json" for record in records]
    settings = [json.loads(report.read_text())["settings"] for report in reports]
    assert [values["smallest_region"] for values in settings] == [0.1, 1.0, 0.1]
    reference, like_it, largest = summary["rows"]
    assert "infection" not in largest
    assert reference["lung"]["mean"] == like_it["lung"]["mean"]
    assert like_it["lung"]["difference"] == 0
    assert reference["infection"]["step_gb"] > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        *("summary.json", "table.md"),
        *("differences.png", "cases.png", "comparison.png"),
    }
    report = reports[0].parent
    slices = module._load_slices(report / "slices.npz")
    assert [overlay.title.split()[0] for _, overlay in slices] == ["coronacases_003"]
    assert all(set(o.reference) == set(o.predicted) == {"lung", "infection"} for _, o in slices)
    print_ablation(summary)
    assert "other infection" in capsys.readouterr().out

    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("run again"))
    (tmp_path / "run" / "runs.jsonl").write_text(first_line)  # as a process leaves it that looked too early
    assert json.dumps(run()) == json.dumps(summary)
    assert (tmp_path / "run" / "runs.jsonl").read_text() == lines
    (report / "slices.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"slices\.npz: damaged"):
        run()
    (report / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: damaged .* the run is tested again"):
        run()


def test_runs_are_known_by_their_cases_not_by_how_these_were_chosen() -> None:
    """So that a fold of a protocol that was run on its own, by a split file, need not be run again."""

    def key(split: Split) -> str:
        return Run(ROWS[0], 0, SplitRequest(), split, configs(ROWS[0], CHANGES, 0)).key

    chosen = Split(("coronacases_001",), (), ("coronacases_002",))
    assert key(dataclasses.replace(chosen, protocol="patient_five_fold, fold 0 of 5")) == key(chosen)
    assert key(dataclasses.replace(chosen, test=("coronacases_003",))) != key(chosen)


def line(seed: int, dice: dict[str, float | None], seconds: float = 1.0) -> dict:
    def volume(case: str, structure: str, value: float | None) -> dict:
        patient = case.split("_", maxsplit=1)[0]
        return {
            "case": case,
            "patient": patient,
            "structure": structure,
            "dice": value,
            "lesion_recall": None if structure == "lung" or value is None else value,
            "false_lesions": None if structure == "lung" else 2.0,
        }

    cost = {"seconds_per_step": seconds, "parameters": 10, "step_gb": 0.5}
    volumes = [volume(case, s, 0.9 if s == "lung" else dice[case]) for case in dice for s in ("lung", "infection")]
    return {"seed": seed, "volumes": volumes, "cost": {"lung": cost, "infection": cost}}


def test_rows_are_compared_volume_by_volume_and_seed_by_seed() -> None:
    """Volumes differ by more than rows do: unpaired, nothing could be told. Runs and volumes may be in any order."""
    first = [line(0, {"a_1": 0.1, "b_1": 0.9}), line(1, {"a_1": 0.2, "b_1": 0.8})]
    other = [line(1, {"b_1": 0.85, "a_1": 0.25}, 1.5), line(0, {"b_1": 0.95, "a_1": 0.15}, 1.5)]
    reference, row = summarize_runs({"first": first, "other": other})
    assert row["infection"]["mean"] == pytest.approx(0.55)
    assert row["infection"]["lowest"] == pytest.approx(0.2)
    assert row["infection"]["volumes"] == pytest.approx({"a_1": 0.2, "b_1": 0.9})
    for name in ("difference", "difference_low", "difference_high"):
        assert row["infection"][name] == pytest.approx(0.05)
    assert reference["infection"]["difference"] == 0
    assert row["infection"]["ci_low"] < 0.3
    assert row["infection"]["ci_high"] > 0.8
    assert row["lung"]["seconds_per_step"] == 1.5
    assert row["false_lesions"] == 2
    assert row["lesion_recall"] == pytest.approx(0.55)


def test_a_row_may_be_of_the_lung_model_alone() -> None:
    both = [line(seed, {"a_1": 0.1, "b_1": 0.3}) for seed in (0, 1)]
    alone = [{**run, "cost": {"lung": run["cost"]["lung"]}} for run in both]
    for run in alone:
        run["volumes"] = [row for row in run["volumes"] if row["structure"] == "lung"]
    rows = summarize_runs({"both": both, "lung alone": alone})
    assert "infection" not in rows[1]
    assert rows[1]["lung"]["difference"] == 0
    table = to_markdown({"rows": rows})
    assert "| lung alone | 0.9000 |" in table
    assert "| lung | both | lung alone |\n| --- | --- | --- |\n| a_1 | 0.900 | 0.900 |" in table
    assert "| infection | both |\n| --- | --- |\n| a_1 | 0.100 |\n| b_1 | 0.300 |" in table
    assert set(configs(Row("lung alone", infection=None), {}, 0)) == {"lung"}


def test_the_first_row_has_what_the_others_are_compared_in(trained: Trained, tmp_path: Path) -> None:
    rows = [Row("lung alone", infection=None), Row("robust")]
    with pytest.raises(InputError, match="put another row first"):
        ablate(rows, trained.data, tmp_path / "run", trained.cache, changes={}, seeds=[0], splits=[])
    assert not (tmp_path / "run").exists()


def test_where_nothing_is_defined_the_table_says_so() -> None:
    (row,) = summarize_runs({"only": [line(0, {"a_1": None, "b_1": None})]})
    assert math.isnan(row["infection"]["mean"])
    assert math.isnan(row["infection"]["lowest"])


def test_an_undefined_volume_is_left_out_of_both_rows() -> None:
    first = [line(seed, {"a_1": 0.1, "b_1": None, "c_1": 0.3}) for seed in (0, 1)]
    other = [line(0, {"a_1": 0.2, "b_1": 0.5, "c_1": 0.4}), line(1, {"a_1": 0.2, "b_1": None, "c_1": 0.4})]
    _, row = summarize_runs({"first": first, "other": other})
    assert row["infection"]["difference"] == pytest.approx(0.1)
    assert row["infection"]["difference_low"] == pytest.approx(0.1)


def test_one_seed_and_one_patient_have_no_interval() -> None:
    (row,) = summarize_runs({"only": [line(0, {"a_1": 0.4, "a_2": 0.6})]})
    assert math.isnan(row["infection"]["ci_low"])
    table = to_markdown({"rows": [row]})
    assert "| 0.500 | +0.000 |" in table
    assert "nan" not in table


def test_rows_are_found_by_name() -> None:
    assert find_rows([]) == list(ROWS)
    assert [row.name for row in find_rows(["original", "robust"])] == ["original", "robust"]
    with pytest.raises(InputError, match="there are robust, original"):
        find_rows(["nothing"])


def test_every_row_is_a_valid_config_and_differs_from_the_others() -> None:
    assert len({tuple(configs(row, {}, 0).values()) for row in ROWS}) == len(ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_recipes() -> None:
    original, robust = (recipe(name, "infection") for name in RECIPES)
    assert original.task == robust.task == "infection"
    assert dataclasses.replace(original, preprocess=Config().preprocess) == Config(task="infection")
    assert original.preprocess.normalization == "minmax"
    assert robust != original
    with pytest.raises(InputError, match="original and robust"):
        recipe("best", "lung")  # type: ignore[arg-type]
    np.testing.assert_allclose(original.preprocess.body_thresholds_minmax, (50 / 255, 175 / 255))
