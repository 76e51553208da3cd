"""Bookkeeping by trainings and evaluations that only say that they were called, and one real study."""

import csv
import dataclasses
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from resunet_jax import __version__
from resunet_jax.config import Config
from resunet_jax.data.cases import Case, find_cases
from resunet_jax.data.splits import NUM_FOLDS, Split, SplitRequest
from resunet_jax.errors import InputError, StoppedError
from resunet_jax.evaluation.compare import Evaluation
from resunet_jax.files import dir_lock, write_json
from resunet_jax.metrics import METRICS, Metric
from resunet_jax.metrics.overlap import TOLERANCE_MM
from resunet_jax.plots import Overlay
from resunet_jax.plugins import Tables
from resunet_jax.studies import runner as module
from resunet_jax.studies.published import PUBLISHED
from resunet_jax.studies.runner import Run, Study, ablate, begin_study, cross_validate
from resunet_jax.studies.table import print_ablation, print_cross_validation
from resunet_jax.studies.variants import Variant, find_variants
from resunet_jax.training.losses import LOSSES
from tests.conftest import KilledError, Trained, kill_at

CHANGES = {
    "preprocess.image_size": 32,
    "model.filters": [4, 8, 16, 32],
    "train.epochs": 1,
    "train.batch_size": 4,
}
LUNG_ALIKE = [
    Variant("robust"),
    Variant("other infection", infection={"train.loss": "bce:1"}),
    Variant("largest component alone", lung={"postprocess.min_component_fraction": 1.0}, infection=None),
]
SPLIT = {"train": ["coronacases_001", "coronacases_002"], "val": [], "test": ["coronacases_003"]}


class Calls:
    """In place of `train` and `evaluate`: notes what it is called for, and raises a `KilledError` where it is told."""

    def __init__(self) -> None:
        self.trained: list[Path] = []
        self.evaluated: list[Path] = []
        self.arguments: dict[str, Any] = {}
        self.kill_at = 0
        self._numbers = itertools.count(1)

    def train(self, config: Config, data: Path, workdir: Path, *_: Any, lung_checkpoint: Any, **kwargs: Any) -> list:
        assert (lung_checkpoint is None) == (config.task == "lung")
        with dir_lock(workdir):
            if next(self._numbers) == self.kill_at:
                raise KilledError
            self.trained.append(workdir)
            assert kwargs["assumed"] == self.arguments.setdefault("assumed", kwargs["assumed"])
            self.arguments |= kwargs
            return [{"step": 3, "steps_per_second": 2.0}]

    def evaluate(self, *_: Any, output_dir: Path, lung_checkpoint: Path, metrics: Any, **kwargs: Any) -> Evaluation:
        self.evaluated.append(output_dir)
        self.arguments |= kwargs | {"metrics": metrics}
        structures = ("lung", "infection") if kwargs["infection_checkpoint"] else ("lung",)
        facts = {"case": "coronacases_003", "patient": "p", "volume_ml": 1.0, "reference_ml": 2.0}
        masks = {structure: np.eye(4) > 0 for structure in structures}
        overlay = Overlay("coronacases_003 slice 0", np.zeros((4, 4), np.float32), masks, masks)
        settings = {"threshold": {}, "tolerance_mm": dict(TOLERANCE_MM)}
        volumes = [{**facts, **dict.fromkeys(metrics, 0.5), "structure": structure} for structure in structures]
        return Evaluation(volumes, [], [], {}, {}, [(0.5, overlay)], settings, metrics)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(module, "train", calls.train)
    monkeypatch.setattr(module, "evaluate", calls.evaluate)
    monkeypatch.setattr(module, "write_report", lambda _, folder: (folder / "metrics.json").write_text("{}"))
    monkeypatch.setattr(module, "_size", lambda *_: (10, 0.5))
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    for picture in ("save_differences", "save_cases", "save_comparison", "save_boxes", "save_volumes"):
        monkeypatch.setattr(module, picture, lambda path, *_: path.touch())
    return calls


Ablation = Callable[..., dict]


@pytest.fixture
def ablation(phantom: Path, tmp_path: Path) -> Ablation:
    """A small ablation in run/; keywords replace what it is made of."""
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))

    def run(**kwargs: Any) -> dict:
        names = [field.name for field in dataclasses.fields(Study)]
        study = {"data_dir": phantom, **{name: kwargs.pop(name) for name in names if name in kwargs}}
        values = {"changes": CHANGES, "seeds": [3], "splits": [SplitRequest(tmp_path / "split.json")], **kwargs}
        variants = values.pop("variants", LUNG_ALIKE)
        return ablate(Study(workdir=tmp_path / "run", cache_dir=tmp_path / "cache", **study), variants, **values)

    return run


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "runs.jsonl").read_text().splitlines()]


def test_what_variants_decide_against_the_flags_is_named(
    ablation: Ablation, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    """And that nothing is left of what one changes."""
    other = Variant("cross-entropy alone", infection={"train.loss": "bce:1"})
    variants = [Variant("robust"), other, Variant("slow", lung={"train.learning_rate": 1e-4})]
    ablation(variants=variants, changes={**CHANGES, "train.loss": "bce:1", "train.learning_rate": 1e-3})
    assert caplog.messages[:2] == [
        "variant 'slow' keeps its own train.learning_rate, whatever is given for all",
        "variants 'robust' and 'cross-entropy alone' are the same with these settings",
    ]
    assert calls.trained


def test_an_ablation_resumes_after_a_kill_and_trains_a_shared_lung_model_once(
    ablation: Ablation, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.kill_at = 3
    with pytest.raises(KilledError):
        ablation()
    first = (tmp_path / "run" / "runs.jsonl").read_text()
    assert [record["variant"] for record in records(tmp_path / "run")] == ["robust"]
    summary = ablation()
    assert (tmp_path / "run" / "runs.jsonl").read_text().startswith(first)
    done = records(tmp_path / "run")
    assert [folder.parent.name for folder in calls.trained] == ["lung", "infection", "infection"]
    assert [record["variant"] for record in done] == ["robust", "other infection", "largest component alone"]
    assert [record["row"] for record in done] == [record["variant"] for record in done]
    assert {record["seed"] for record in done} == {3}
    assert len({record["folders"]["lung"] for record in done}) == 1
    assert len({record["folders"].get("infection") for record in done}) == 3
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        *("lung", "infection", "reports", "runs.jsonl", "versions.json"),
        *("summary.json", "table.md", "differences.png", "cases.png", "comparison.png"),
    }
    assert summary["rows"][0]["false_lesions"] == summary["rows"][0]["false_positive_lesions"] == 0.5
    assert summary["rows"][0]["lung"]["seconds_per_step"] == 0.5
    print_ablation(summary)
    assert "other infection" in capsys.readouterr().out

    lines = (tmp_path / "run" / "runs.jsonl").read_text()
    (tmp_path / "run" / "runs.jsonl").write_text(first)  # as a process leaves it that looked too early
    assert json.dumps(ablation()) == json.dumps(summary)
    assert (tmp_path / "run" / "runs.jsonl").read_text() == lines
    assert len(calls.trained) == len(calls.evaluated) == 3


def test_runs_of_another_process_are_left_to_it(ablation: Ablation, calls: Calls, tmp_path: Path) -> None:
    ablation()
    keys = {record["variant"]: record["key"] for record in records(tmp_path / "run")}
    for folder in ("reports", "lung", "infection"):
        (tmp_path / "run" / folder).rename(tmp_path / folder)
    calls.trained.clear()
    asked = itertools.count()
    with dir_lock(tmp_path / "run" / ".running" / keys["other infection"]):
        with pytest.raises(StoppedError, match="the same command resumes"):
            ablation(should_stop=lambda step: step == 0 and next(asked) == len(keys))  # at the second look at its runs
        assert [record["variant"] for record in records(tmp_path / "run")] == ["robust", "largest component alone"]
    ablation()
    assert [folder.parent.name for folder in calls.trained] == ["lung", "infection", "infection"]


def test_a_study_that_is_to_stop_begins_no_further_run(ablation: Ablation, calls: Calls) -> None:
    with pytest.raises(StoppedError, match="the same command resumes"):
        ablation(should_stop=lambda step: True)
    assert not calls.trained
    assert not calls.evaluated


def test_what_a_training_would_refuse_is_refused_before_the_first(phantom: Path, calls: Calls, tmp_path: Path) -> None:
    study = Study(phantom, tmp_path / "run", tmp_path / "cache")
    changes = {"preprocess.normalization": "minmax"}
    with pytest.raises(InputError, match="robust, infection: lesion_densify_prob"):
        cross_validate(study, Variant("robust", "robust"), protocol="few_shot", changes=changes, allow_missing=True)
    with pytest.raises(InputError, match="may differ in context_mm alone"):
        variant = Variant("sizes", "robust", infection={"preprocess.image_size": 64})
        cross_validate(study, variant, protocol="few_shot", changes={}, allow_missing=True)
    assert not calls.trained
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("study", ["ablation", "cross-validation"])
def test_several_processes_share_a_study(
    ablation: Ablation, calls: Calls, phantom: Path, tmp_path: Path, study: str
) -> None:
    begun = threading.Barrier(3)

    def run(_: int) -> dict:
        begun.wait()
        if study == "ablation":
            return ablation(seeds=[0, 1, 2])
        return cross_validate(
            Study(phantom, tmp_path / "run", tmp_path / "cache"),
            LUNG_ALIKE[0],
            protocol="patient_five_fold",
            changes=CHANGES,
        )

    with ThreadPoolExecutor(3) as executor:
        summaries = [json.dumps(summary) for summary in executor.map(run, range(3))]
    assert len(set(summaries)) == 1
    runs, trainings = (9, 9) if study == "ablation" else (NUM_FOLDS, 2 * NUM_FOLDS)
    assert len(records(tmp_path / "run")) == len(calls.evaluated) == runs
    assert len(set(calls.trained)) == len(calls.trained) == trainings


def test_equal_runs_are_done_once(ablation: Ablation, calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_text(json.dumps(SPLIT))
    variants = [*LUNG_ALIKE[:2], Variant("the same", lung={"train.epochs": 1})]
    split_files = [SplitRequest(tmp_path / name) for name in ("split.json", "copy.json")]
    summary = ablation(variants=variants, seeds=[0, 0], splits=split_files)
    assert len(calls.evaluated) == 2
    assert [folder.parent.name for folder in calls.trained] == ["lung", "infection", "infection"]
    assert [record["variant"] for record in records(tmp_path / "run")] == ["robust", "other infection"]
    assert [row["name"] for row in summary["rows"]] == ["robust", "other infection", "the same"]
    assert summary["rows"][2]["lung"]["difference"] == 0
    assert (summary["seeds"], summary["splits"]) == ([0], ["test coronacases_003"])


def test_models_that_differ_in_how_lung_masks_are_made_are_the_same_trainings(
    ablation: Ablation, calls: Calls, tmp_path: Path
) -> None:
    fraction = {"postprocess.min_component_fraction": 1.0}
    ablation(variants=[LUNG_ALIKE[0], Variant("largest component alone", lung=fraction)])
    assert [folder.parent.name for folder in calls.trained] == ["lung", "infection"]
    assert len(calls.evaluated) == 2
    assert calls.arguments["min_component_fraction"] == 1.0


def test_runs_are_known_by_their_cases_not_by_how_these_were_chosen() -> None:
    """So that a fold of a protocol that was run on its own, by a split file, need not be run again."""

    def key(split: Split) -> str:
        configs = LUNG_ALIKE[0].configs(CHANGES, 0)
        return Run(LUNG_ALIKE[0], 0, SplitRequest(), split, configs, configs).key

    chosen = Split(("coronacases_001",), (), ("coronacases_002",))
    assert key(dataclasses.replace(chosen, protocol="patient_five_fold, fold 0 of 5")) == key(chosen)
    assert key(dataclasses.replace(chosen, test=("coronacases_003",))) != key(chosen)


def test_a_report_that_lacks_a_metric_is_written_again_and_nothing_is_trained(
    ablation: Ablation, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation()
    calls.trained.clear()
    before = (tmp_path / "run" / "runs.jsonl").read_text()
    tables = Tables(
        metrics={**METRICS, "mine": Metric(lambda _: 0.0, "mine")}, losses={**LOSSES, "mine": LOSSES["bce"]}
    )
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_report", lambda *_: (tmp_path / "none" / "file").touch())
        with pytest.raises(InputError, match="cannot be written"):
            ablation(tables=tables)
    ablation()
    assert (tmp_path / "run" / "runs.jsonl").read_text() == before  # the report that could not be replaced is there
    calls.evaluated.clear()
    ablation(tables=tables)
    assert (len(calls.evaluated), calls.trained) == (3, [])
    assert all(row["mine"] == 0.5 for record in records(tmp_path / "run") for row in record["volumes"])
    ablation(tables=tables, seeds=[4])
    assert calls.arguments["losses"] is tables.losses
    assert calls.arguments["metrics"] is tables.metrics
    assert calls.arguments["readers"] is tables.readers
    assert len(calls.evaluated) == 6


def test_a_workdir_is_of_one_kind_of_study(ablation: Ablation, calls: Calls, phantom: Path, tmp_path: Path) -> None:
    ablation()
    study = Study(phantom, tmp_path / "run", tmp_path / "cache")
    with pytest.raises(InputError, match="run: holds a study by another script; choose a new `workdir`"):
        cross_validate(study, LUNG_ALIKE[0], protocol="patient_five_fold", changes=CHANGES)


def test_processes_that_begin_a_study_together_lose_no_record(
    phantom: Path, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with cases of its own, between whose reading and writing the others have time."""

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.05)
        write_json(*arguments)

    monkeypatch.setattr("resunet_jax.training.train.write_json", write_slowly)
    study, cases = Study(phantom, tmp_path / "run", tmp_path / "cache"), find_cases(phantom)
    for case in cases:
        other = next(other.id for other in cases if other.patient != case.patient)
        (tmp_path / f"{case.id}.json").write_text(json.dumps({"train": [other], "test": [case.id]}))

    def begin(case: Case) -> None:
        begin_study(study, LUNG_ALIKE[:1], CHANGES, [3], [SplitRequest(tmp_path / f"{case.id}.json")])

    with ThreadPoolExecutor(len(cases)) as executor:
        list(executor.map(begin, cases))
    assert {case.id for case in cases} <= set(json.loads((tmp_path / "run" / "data.json").read_text()))


def test_damage_is_named(ablation: Ablation, calls: Calls, tmp_path: Path) -> None:
    ablation()
    report = tmp_path / "run" / "reports" / records(tmp_path / "run")[0]["key"]
    for file, message in (
        (report / "run.json", r"run\.json: cannot be read .* the run is tested again"),
        (tmp_path / "run" / "versions.json", r"versions\.json: cannot be read .* choose a new `workdir`"),
    ):
        for text in ("{", "{}", "[]"):
            file.write_text(text)
            with pytest.raises(InputError, match=message):
                ablation()


@pytest.mark.parametrize("version", ["0.6.0", "0.17.0", "not installed"])
def test_studies_of_older_versions_are_refused(
    ablation: Ablation, calls: Calls, phantom: Path, tmp_path: Path, version: str
) -> None:
    ablation()
    file = tmp_path / "run" / "versions.json"
    versions = json.loads(file.read_text())
    assert versions["resunet-jax"] == __version__
    file.write_text(json.dumps({**versions, "resunet-jax": version}))
    calls.trained.clear()
    with pytest.raises(InputError, match=f"begun by resunet_jax {version}, whose results differ"):
        ablation(seeds=[9])
    (tmp_path / "run" / "cross_validation.json").write_text('{"lung": {}, "infection": {}, "splits": []}')
    study = Study(phantom, tmp_path / "run", tmp_path / "cache")
    with pytest.raises(InputError, match=f"begun by resunet_jax {version}"):
        cross_validate(study, LUNG_ALIKE[0], protocol="patient_five_fold", changes=CHANGES)
    assert calls.trained == []


def test_studies_of_versions_with_the_same_results_are_resumed(
    ablation: Ablation, calls: Calls, tmp_path: Path
) -> None:
    ablation()
    file = tmp_path / "run" / "versions.json"
    calls.trained.clear()
    for version in ("0.18.0", "0.18.7", "1.0.0"):
        file.write_text(json.dumps({"resunet-jax": version}))
        ablation()
    assert calls.trained == []


@pytest.mark.parametrize("changed", ["scan", "mask of a test case", "mask of a training case"])
@pytest.mark.parametrize("kind", ["ablation", "cross-validation"])
def test_a_study_whose_data_have_changed_is_not_resumed(
    ablation: Ablation, calls: Calls, phantom: Path, tmp_path: Path, changed: str, kind: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantom, data)

    def run() -> dict:
        if kind == "ablation":
            return ablation(data_dir=data)
        study = Study(data, tmp_path / "run", tmp_path / "cache")
        return cross_validate(study, LUNG_ALIKE[0], protocol="patient_five_fold", changes=CHANGES)

    run()
    run()  # as it is, it resumes
    calls.trained.clear()
    calls.evaluated.clear()
    case = next(c for c in find_cases(data) if c.id == ("coronacases_003" if "test" in changed else "coronacases_001"))
    file = case.ct if changed == "scan" else case.lung_mask
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"run: a scan, mask or patient of {case.id} has changed since .*`workdir`"
    ) as refused:
        run()
    assert "\n" not in str(refused.value)
    assert (calls.trained, calls.evaluated) == ([], [])
    content[-1] ^= 1
    file.write_bytes(content)
    run()
    with (data / "metadata.csv").open(newline="", encoding="utf-8") as old:
        rows = list(csv.reader(old))
    with (data / "metadata.csv").open("w", newline="", encoding="utf-8") as new:
        csv.writer(new).writerows(
            [[*rows[0], "patient"], *([*row, f"p{number}"] for number, row in enumerate(rows[1:]))]
        )
    with pytest.raises(InputError, match=r"of .*coronacases_001 \(patient\).* has changed"):
        run()


def test_a_study_takes_what_is_assumed_of_its_scans(ablation: Ablation, calls: Calls) -> None:
    ablation(assumed=(0.0, 255.0), variants=LUNG_ALIKE[:1])
    assert calls.arguments["assumed"] == (0.0, 255.0)
    with pytest.raises(InputError, match=r"has changed since this run began, or `assumed` has, .*; restore it"):
        ablation(variants=LUNG_ALIKE[:1])


def test_runs_that_begin_with_a_trained_model_are_others(ablation: Ablation, calls: Calls, trained: Trained) -> None:
    """The lung model is shared where only the infection model begins with one."""
    variants = [Variant("robust")]
    ablation(variants=variants)
    assert calls.arguments["initial_checkpoint"] is None
    ablation(variants=variants, initial={"infection": trained.infection})
    assert [folder.parent.name for folder in calls.trained] == ["lung", "infection", "infection"]
    assert calls.arguments["initial_checkpoint"] == trained.infection
    ablation(variants=variants, initial={"lung": trained.lung, "infection": trained.infection})
    assert [folder.parent.name for folder in calls.trained[3:]] == ["lung", "infection"]
    with pytest.raises(InputError, match="expected a lung model, this one segments infection"):
        ablation(variants=variants, initial={"lung": trained.infection})
    with pytest.raises(InputError, match=r"robust, infection: .*filters \(4, 8, 16, 32\), not \(64, "):
        ablation(variants=variants, initial={"infection": trained.infection}, changes={"train.epochs": 1})
    with pytest.raises(InputError, match="`initial_infection_checkpoint`: no variant has an infection model"):
        ablation(variants=LUNG_ALIKE[2:], initial={"infection": trained.infection})
    with pytest.raises(InputError, match=r"variant 'infection: random beginning': .*; leave one of the two out"):
        ablation(variants=find_variants(["infection: random beginning"]), initial={"infection": trained.infection})
    assert len(set(calls.trained)) == len(calls.trained) == 5


def test_a_study_takes_further_cases_and_guards_them_too(
    ablation: Ablation, calls: Calls, phantom: Path, tmp_path: Path
) -> None:
    ablation()
    before = json.loads((tmp_path / "run" / "data.json").read_text())
    cases = [f"coronacases_00{number}" for number in (1, 2, 3)]
    assert sorted(before) == sorted([*cases, *(f"{case} (patient)" for case in cases)])
    (tmp_path / "more.json").write_text(json.dumps({**SPLIT, "test": ["radiopaedia_14_85914_0"]}))
    ablation(splits=[SplitRequest(tmp_path / "more.json")])
    after = json.loads((tmp_path / "run" / "data.json").read_text())
    assert {**after, **before} == after
    further = "radiopaedia_14_85914_0"
    assert set(after) - set(before) == {further, f"{further} (patient)"}


def test_cases_without_infection_masks_hinder_only_those_who_use_them(
    ablation: Ablation, calls: Calls, phantom: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantom, data)
    rows = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()
    columns, first = rows[0].split(","), rows[1].split(",")
    first[columns.index("infection_mask")] = ""
    (data / "metadata.csv").write_text("\n".join([rows[0], ",".join(first), *rows[2:]]), encoding="utf-8")
    without = next(case.id for case in find_cases(data) if case.infection_mask is None)
    assert without in SPLIT["train"]
    with pytest.raises(InputError, match=f"{without}: no infection mask"):
        ablation(data_dir=data)
    assert calls.trained == []
    ablation(data_dir=data, variants=[Variant("lung alone", infection=None)])
    other = {**SPLIT, "train": [case for case in SPLIT["train"] if case != without]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    ablation(data_dir=data, splits=[SplitRequest(tmp_path / "other.json")])


def test_what_cannot_be_run_is_told_before_anything_is_trained(
    ablation: Ablation, phantom: Path, tmp_path: Path
) -> None:
    lung_alone = Variant("lung alone", infection=None)
    with pytest.raises(InputError, match="'lung alone' has no infection model; put another variant first"):
        ablation(variants=[lung_alone, LUNG_ALIKE[0]])
    with pytest.raises(InputError, match="two of these variants have one name: robust, robust"):
        ablation(variants=[LUNG_ALIKE[0], Variant("robust", "original")])
    (tmp_path / "none.json").write_text('{"train": [], "test": ["coronacases_003"]}')
    with pytest.raises(InputError, match=r"none\.json: the split has no train case"):
        ablation(splits=[SplitRequest(tmp_path / "split.json"), SplitRequest(tmp_path / "none.json")])
    with pytest.raises(InputError, match=r"variant 'robust': there is no train\.epoch;"):
        ablation(changes={"train.epoch": 1})
    with pytest.raises(InputError, match=r"coronacases_004.*are missing.*`allow_missing`"):
        cross_validate(
            Study(phantom, tmp_path / "run", tmp_path / "cache"), LUNG_ALIKE[0], protocol="five_fold", changes={}
        )
    assert not (tmp_path / "run").exists()


def test_a_cross_validation_resumes_after_a_kill_and_ends_with_one_table(
    phantom: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    study = Study(phantom, workdir, tmp_path / "cache")

    def run(**changes: Any) -> dict:
        return cross_validate(study, LUNG_ALIKE[0], protocol="patient_five_fold", changes={**CHANGES, **changes})

    calls.kill_at = 4
    with pytest.raises(KilledError):
        run()
    done = [path.relative_to(workdir).as_posix() for path in calls.trained]
    assert done == ["fold_0/lung", "fold_0/infection", "fold_1/lung"]
    before = (workdir / "fold_0" / "report" / "run.json").stat().st_mtime_ns
    results = run()
    assert (workdir / "fold_0" / "report" / "run.json").stat().st_mtime_ns == before
    folders = [workdir / f"fold_{fold}" / task for fold in range(NUM_FOLDS) for task in ("lung", "infection")]
    assert calls.trained == folders
    assert [row["fold"] for row in results["volumes"] if row["structure"] == "lung"] == list(range(NUM_FOLDS))
    tested = [case for record in records(workdir) for case in record["split"]["test"]]
    assert sorted(tested) == sorted(case.id for case in find_cases(phantom))
    saved = json.loads((workdir / "summary.json").read_text())
    assert saved["summary"]["lung"]["dice"]["mean"] == results["summary"]["lung"]["dice"]["mean"] == 0.5
    assert saved["summary"]["lung"]["lung_part_error"] == saved["summary"]["lung"]["lung_involvement_error"]
    settings = json.loads((workdir / "cross_validation.json").read_text())
    assert settings["lung"]["train"]["epochs"] == 1
    assert len(settings["splits"]) == NUM_FOLDS
    assert {path.name for path in workdir.iterdir()} >= {
        *("versions.json", "runs.jsonl", "boxes.png", "volumes.png", "volumes.csv"),
    }
    print_cross_validation(results)
    out = capsys.readouterr().out
    assert "only 6 of the full set's 20 cases" in out
    assert out.count("different data") == len([row for row in PUBLISHED if row.structure in ("lung", "infection")])
    with pytest.raises(InputError, match=r"cross_validation\.json: is of other settings or cases"):
        run(**{"train.epochs": 2})


def test_the_size_of_a_model_is_computed_once_for_all_seeds(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_train_step(*configs: Config, **tables: Any) -> tuple:
        compiled.append([config.task for config in configs])
        assert tables == {name: getattr(study.tables, name) for name in ("losses", "augmentations", "architectures")}
        return step, SimpleNamespace(variables={"params": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}})

    step = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=5e8))
    monkeypatch.setattr(module, "compile_train_step", compile_train_step)
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    study = Study(phantom, tmp_path / "run", tmp_path / "cache")
    plan = begin_study(study, LUNG_ALIKE[:1], CHANGES, [0, 1], [SplitRequest(tmp_path / "split.json")])
    assert {module._size(study, run, task) for run in plan for task in run.configs} == {(8, 0.5)}
    assert compiled == [["lung"], ["infection", "lung"]]


def test_a_real_study(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first training, and resumed."""
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    folders = kill_at(monkeypatch, module, call=2)
    monkeypatch.setattr(module, "_size", lambda *_: (10, 0.5))  # which would compile both models once more
    study = Study(phantom, tmp_path / "run", tmp_path / "cache", tensorboard=True)
    plan = begin_study(study, LUNG_ALIKE[::2], CHANGES, [3], [SplitRequest(tmp_path / "split.json")])

    def run() -> dict:
        splits = [SplitRequest(tmp_path / "split.json")]
        return ablate(study, LUNG_ALIKE[::2], changes=CHANGES, seeds=[3], splits=splits)

    with pytest.raises(KilledError):
        run()
    summary = run()
    assert [folder.parent.name for folder in folders] == ["lung", "infection"]
    assert all(list((folder / "tensorboard").glob("events.*")) for folder in folders)
    reports = [study.report(run) for run in plan]
    assert [record["key"] for record in records(tmp_path / "run")] == [report.name for report in reports]
    settings = [json.loads((report / "metrics.json").read_text())["settings"] for report in reports]
    assert [values["smallest_region"] for values in settings] == [0.1, 1.0]
    both, largest = summary["rows"]
    assert "infection" not in largest
    assert set(both["infection"]["volumes"]) == {"coronacases_003"}
    assert both["infection"]["seconds_per_step"] > 0
    assert (tmp_path / "run" / "comparison.png").stat().st_size > 1000


@pytest.mark.exhaustive
def test_a_real_cross_validation(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = tmp_path / "run"
    study = Study(phantom, workdir, tmp_path / "cache")
    folders = kill_at(monkeypatch, module, call=4)
    with pytest.raises(KilledError):
        cross_validate(study, LUNG_ALIKE[0], protocol="patient_five_fold", changes=CHANGES)
    results = cross_validate(study, LUNG_ALIKE[0], protocol="patient_five_fold", changes=CHANGES)
    assert len(folders) == len(set(folders)) == 2 * NUM_FOLDS
    costs = [record["cost"] for record in records(workdir)]
    assert all(0 < cost["lung"]["parameters"] < cost["infection"]["parameters"] for cost in costs)
    assert all(cost[task]["step_gb"] > 0 for cost in costs for task in cost)
    rows = [row for row in results["volumes"] if row["structure"] == "infection"]
    assert sorted(row["case"] for row in rows) == sorted(case.id for case in find_cases(phantom))
    for fold in range(NUM_FOLDS):
        split = json.loads((workdir / f"fold_{fold}" / "lung" / "split.json").read_text())
        assert sorted(row["case"] for row in rows if row["fold"] == fold) == sorted(split["test"])
        metrics = json.loads((workdir / f"fold_{fold}" / "report" / "metrics.json").read_text())
        assert {row["case"] for row in metrics["volumes"]} == set(split["test"])
    assert {path.name for path in workdir.iterdir()} >= {"boxes.png", "volumes.png", "volumes.csv", "summary.json"}
