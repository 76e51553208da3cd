import csv
import json
import math
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.data.cases import find_cases
from resunet_jax.data.prepared import prepare_cases
from resunet_jax.data.volumes import read_mask, read_volume
from resunet_jax.errors import InputError
from resunet_jax.evaluation.evaluate import Evaluation, evaluate_cases
from resunet_jax.evaluation.metrics import soft_metrics
from resunet_jax.evaluation.report import print_table, write_report
from resunet_jax.evaluation.run import evaluate
from resunet_jax.inference.segment import load_segmenter, segment_scan
from tests.conftest import TINY, Trained


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
    segmenter = load_segmenter(trained.lung, trained.infection, batch_size=3)
    cases = {case.id: case for case in find_cases(trained.data)}
    assert len(evaluation.volumes) == 4
    for row in evaluation.volumes:
        case = cases[row["case"]]
        volume = read_volume(case.ct)
        paths = dict(zip(("lung", "infection"), segment_scan(case.ct, tmp_path, segmenter), strict=True))
        predicted = read_mask(paths[row["structure"]], case.ct, volume.grid) > 0
        actual = read_mask(getattr(case, f"{row['structure']}_mask"), case.ct, volume.grid) > 0
        assert row["tp"] == (predicted & actual).sum()
        assert row["fp"] == (predicted & ~actual).sum()
        assert row["fn"] == (~predicted & actual).sum()
        assert sum(row[name] for name in ("tp", "fp", "fn", "tn")) == actual.size


def test_does_not_depend_on_batch_size_or_order(evaluation: Evaluation, trained: Trained) -> None:
    cases = [case for case in find_cases(trained.data) if case.id in {row["case"] for row in evaluation.volumes}]
    prepared = prepare_cases(cases[::-1], TINY["preprocess"], trained.cache)
    other = evaluate_cases(load_segmenter(trained.lung, trained.infection, batch_size=5), prepared)
    key = itemgetter("case", "structure")
    np.testing.assert_equal(sorted(other.volumes, key=key), sorted(evaluation.volumes, key=key))
    np.testing.assert_equal(sorted(other.model_grid, key=key), sorted(evaluation.model_grid, key=key))


def test_soft_numbers_are_means_over_batches_of_four(evaluation: Evaluation, trained: Trained) -> None:
    cases = [case for case in find_cases(trained.data) if case.id in {row["case"] for row in evaluation.volumes}]
    prepared = prepare_cases(cases, TINY["preprocess"], trained.cache)
    segmenter = load_segmenter(trained.lung, None)
    probability = np.concatenate([segmenter.probabilities(one.images)["lung"] for one in prepared])
    target = np.concatenate([one.lung for one in prepared])
    batches = [soft_metrics(probability[i : i + 4], target[i : i + 4]) for i in range(0, len(target), 4)]
    expected = np.mean([batch["dice"] for batch in batches])
    np.testing.assert_allclose(evaluation.soft_batch["lung"]["dice"], expected, rtol=1e-5)


def row(case: str, dice: float) -> dict:
    metrics = dict.fromkeys(("precision", "recall", "specificity", "accuracy"), 1.0)
    return {"case": case, "structure": "lung", "dice": dice, **metrics, "empty": "neither"}


def test_summary_leaves_out_what_is_undefined_and_says_so() -> None:
    rows = [row("a", 0.5), row("b", 1.0), row("c", 0.9), row("d", math.nan)]
    summary = Evaluation(rows, [], {}, []).summary()["lung"]["dice"]
    assert summary["mean"] == pytest.approx(0.8)
    assert summary["sd"] == pytest.approx(np.std([0.5, 1.0, 0.9], ddof=1))
    assert summary["median"] == 0.9
    assert (summary["volumes"], summary["undefined"]) == (4, 1)


def test_json_has_null_for_undefined() -> None:
    values = json.loads(Evaluation([row("a", math.nan)], [], {}, []).to_json())
    assert values["volumes"][0]["dice"] is None
    assert values["summary"]["lung"]["dice"]["mean"] is None


def test_report_files(evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(evaluation, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "metrics.csv", "dice.png", "overlays.png"}
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert set(values) == {"volumes", "summary", "model_grid", "soft_batch"}
    assert {(r["case"], r["structure"]) for r in values["volumes"]} == {
        (case, structure)
        for case in ("coronacases_003", "radiopaedia_14_85914_0")
        for structure in ("lung", "infection")
    }
    with (tmp_path / "metrics.csv").open() as file:
        assert [r["case"] for r in csv.DictReader(file)] == [r["case"] for r in evaluation.volumes]
    print_table(evaluation)
    out = capsys.readouterr().out
    assert "radiopaedia_14_85914_0" in out
    assert "not comparable" in out


def test_split_comes_from_the_models_or_a_file(trained: Trained, tmp_path: Path) -> None:
    def run(**changes) -> list[str]:
        arguments = {"output_dir": tmp_path, "lung_checkpoint": trained.lung, **changes}
        return [row["case"] for row in evaluate(trained.data, trained.cache, **arguments).volumes]

    assert run(part="val") == ["coronacases_002"]
    assert len(run(part="all")) == 6
    other = tmp_path / "split.json"
    other.write_text('{"train": [], "val": [], "test": ["coronacases_001"]}')
    assert run(split_file=other) == ["coronacases_001"]
    with pytest.raises(InputError, match="no val case"):
        run(split_file=other, part="val")
