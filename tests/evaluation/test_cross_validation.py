import dataclasses
import json
from pathlib import Path

import pytest

from resunet_jax.config import Config
from resunet_jax.data.cases import find_cases
from resunet_jax.errors import InputError
from resunet_jax.evaluation import cross_validation as module
from resunet_jax.evaluation.cross_validation import cross_validate, print_cross_validation, remark
from resunet_jax.evaluation.published import PUBLISHED
from tests.conftest import TINY, KilledError, kill_at


@pytest.mark.slow
def test_goes_on_after_a_kill_and_ends_with_one_table(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = dataclasses.replace(TINY["train"], epochs=1)
    configs = [Config(**{**TINY, "task": task, "train": short}) for task in ("lung", "infection")]
    paths = (phantom, tmp_path / "run", tmp_path / "cache")
    trained = kill_at(monkeypatch, module, call=4)
    with pytest.raises(KilledError):
        cross_validate(*configs, *paths, protocol="patient_five_fold")
    assert [path.relative_to(tmp_path / "run").as_posix() for path in trained] == [
        "fold_0/lung",
        "fold_0/infection",
        "fold_1/lung",
    ]
    done = tmp_path / "run" / "fold_0" / "report" / "metrics.json"
    before = done.stat().st_mtime_ns
    results = cross_validate(*configs, *paths, protocol="patient_five_fold")
    assert done.stat().st_mtime_ns == before
    assert trained[3:5] == [tmp_path / "run" / "fold_1" / task for task in ("lung", "infection")]
    assert len(trained) == 3 + 2 * 4

    rows = [row for row in results["volumes"] if row["structure"] == "infection"]
    assert sorted(row["case"] for row in rows) == sorted(case.id for case in find_cases(phantom))
    for fold in range(5):
        split = json.loads((tmp_path / "run" / f"fold_{fold}" / "lung" / "split.json").read_text())
        assert sorted(row["case"] for row in rows if row["fold"] == fold) == sorted(split["test"])
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["summary"]["lung"]["dice"]["mean"] == results["summary"]["lung"]["dice"]["mean"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"boxes.png", "volumes.png", "volumes.csv"}
    print_cross_validation(results)
    out = capsys.readouterr().out
    assert "only 6 of the full set's 20 cases" in out
    assert out.count("different data") == len(PUBLISHED)

    with pytest.raises(InputError, match="other settings or cases"):
        cross_validate(
            configs[0], dataclasses.replace(configs[1], train=TINY["train"]), *paths, protocol="patient_five_fold"
        )
    (tmp_path / "run" / "fold_3" / "report" / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"fold_3/report/metrics\.json: damaged"):
        cross_validate(*configs, *paths, protocol="patient_five_fold")


def test_missing_cases_are_told_before_anything_is_trained(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"coronacases_004.*are missing.*--allow_missing"):
        cross_validate(
            Config(**TINY),
            Config(task="infection", **TINY),
            phantom,
            tmp_path / "run",
            tmp_path / "cache",
            protocol="five_fold",
        )
    assert not (tmp_path / "run").exists()


def test_remarks_say_what_keeps_rows_apart() -> None:
    ma = next(row for row in PUBLISHED if row.protocol == "five_fold" and row.structure == "infection")
    assert remark(ma, "five_fold", full_set=True) == ""
    assert remark(ma, "five_fold", full_set=False) == "different data"
    assert remark(ma, "patient_five_fold", full_set=True) == "different protocol"
    lungquant = next(row for row in PUBLISHED if row.source.startswith("LungQuant"))
    assert remark(lungquant, "five_fold", full_set=True) == "different data; different protocol"
