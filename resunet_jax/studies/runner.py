"""Ablations and cross-validations: runs (variant × split × seed) that several processes may share, and their tables."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from filelock import FileLock

from resunet_jax.config import Config, Structure, non_defaults, override, to_dict
from resunet_jax.data.cases import Case, find_cases, require_infection_masks
from resunet_jax.data.slice_cache import MAX_CACHE_GB, content_digests
from resunet_jax.data.splits import NUM_FOLDS, Protocol, Split, SplitRequest, make_split
from resunet_jax.errors import InputError, LockedError, StoppedError
from resunet_jax.evaluation.evaluate import evaluate
from resunet_jax.evaluation.report import write_csv, write_report
from resunet_jax.files import (
    atomic_dir,
    check_output_dir,
    dir_lock,
    make_output_dir,
    read_json,
    remove_dir,
    write_json,
    write_text,
)
from resunet_jax.metrics import Metric, with_legacy_keys
from resunet_jax.plots import save_boxes, save_cases, save_comparison, save_differences, save_volumes
from resunet_jax.plugins import Tables
from resunet_jax.progress import logger
from resunet_jax.recipes import recipe
from resunet_jax.studies import table
from resunet_jax.studies.variants import Variant
from resunet_jax.training.loop import never_stop
from resunet_jax.training.step import compile_train_step
from resunet_jax.training.tensorboard import tensorboard_writer
from resunet_jax.training.train import (
    check_data_unchanged,
    check_settings,
    load_initial,
    train,
    versions,
    write_data_record,
)
from resunet_jax.weights.store import fingerprint, require_backend

_RUNNING = ".running"  # locks of what a process is at
_MOST_COMPARED = 4  # variants in a picture
_SAME_RESULTS_SINCE = [0, 18]  # raise it when the same configs and cases would give other results
_SECONDS_BETWEEN_LOOKS = 5.0  # at what other processes have done


class Run(NamedTuple):
    """A variant, trained and tested once.

    `configs` are those of its models by structure; `trainings`, by which they are trained, are the same but for what
    decides only how lung masks are made, so that variants that differ in nothing else share a lung model.
    """

    variant: Variant
    seed: int
    request: SplitRequest
    split: Split
    configs: dict[Structure, Config]
    trainings: dict[Structure, Config]

    @property
    def key(self) -> str:
        """Identifies a run by all that decides its result."""
        return self._digest(*self.configs.values())

    def training_key(self, task: Structure) -> str:
        """Identifies a model by all that decides its training; an infection model also by its lung model."""
        return self._digest(*(self.trainings[t] for t in dict.fromkeys(("lung", task))))

    def _digest(self, *configs: Config) -> str:
        values = [*map(non_defaults, configs), dataclasses.asdict(dataclasses.replace(self.split, protocol=""))]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Layout(NamedTuple):
    """The folders of a study, relative to its workdir: of a run's models and report, and a pattern of all reports."""

    model: Callable[[Run, Structure], str]
    report: Callable[[Run], str]
    reports: str


ABLATION = Layout(lambda r, task: f"{task}/{r.training_key(task)}", lambda r: f"reports/{r.key}", "reports/[!.]*")
CROSS_VALIDATION = Layout(
    lambda r, task: f"fold_{r.request.fold}/{task}", lambda r: f"fold_{r.request.fold}/report", "fold_*/report"
)


@dataclasses.dataclass(frozen=True)
class Study:
    """Where runs find their data and leave their results; several processes may share a workdir.

    Attributes:
      data_dir: see `find_cases`.
      workdir: see `ablate` and `cross_validate`.
      cache_dir: see `prepare_cases`.
      should_stop: see `fit`; also asked, with 0, while other processes are waited for.
      tables: of losses, augmentations, architectures, metrics and readers.
      layout: of the workdir.
      sizes: by configs, what `_size` has found.
      assumed: what the scans' values are, see `open_scan`; by default inferred for each.
      max_cache_gb: see `prepare_cases`.
      tensorboard: see `tensorboard_writer`; in the folder of each model.
      initial: by structure, the trained model that every training begins with, see `train`.
    """

    data_dir: Path
    workdir: Path
    cache_dir: Path
    should_stop: Callable[[int], bool] = never_stop
    tables: Tables = dataclasses.field(default_factory=Tables)
    layout: Layout = ABLATION
    sizes: dict[tuple[Config, ...], tuple[int, float]] = dataclasses.field(default_factory=dict)
    assumed: tuple[float, float] | None = None
    max_cache_gb: float = MAX_CACHE_GB
    tensorboard: bool = False
    initial: Mapping[Structure, Path] = dataclasses.field(default_factory=dict)

    def model(self, run: Run, task: Structure) -> Path:
        """The folder of a run's model."""
        return self.workdir / self.layout.model(run, task)

    def report(self, run: Run) -> Path:
        """The folder of a run's report."""
        return self.workdir / self.layout.report(run)


def begin_study(
    study: Study,
    variants: Sequence[Variant],
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    splits: Sequence[SplitRequest],
) -> list[Run]:
    """Plans every variant with every split and seed, each once, and makes the workdir; see `Variant.configs`.

    Each split is tested on its test cases; without validation cases the model of the last epoch is.

    Raises:
      InputError: data, configs, initial models or splits are not fit for it, or the workdir was begun by an older
        version, by another script, or before a scan, mask or patient of it was changed.
    """
    require_backend()
    if len({variant.name for variant in variants}) < len(variants):
        raise InputError(f"two of these variants have one name: {', '.join(variant.name for variant in variants)}")
    check_output_dir(study.workdir)
    _check_initial(study, variants)
    initial_fingerprints = {
        variant.name: _check_configs(variant, variant.configs(changes, seeds[0]), study) for variant in variants
    }
    cases = find_cases(study.data_dir, study.tables.readers)
    requests: dict[Split, SplitRequest] = {}
    for request in splits:
        split = make_split(cases, request)
        requests.setdefault(split, request)
        _check_split(split, cases, request, with_infection=any(variant.infection is not None for variant in variants))
    plan = []
    for seed in dict.fromkeys(seeds):
        for split, request in requests.items():
            for variant in variants:
                configs = {
                    task: dataclasses.replace(config, initial_fingerprint=initial_fingerprints[variant.name][task])
                    for task, config in variant.configs(changes, seed).items()
                }
                postprocess = override(recipe(variant.recipe, "lung"), changes).postprocess
                trainings = {**configs, "lung": dataclasses.replace(configs["lung"], postprocess=postprocess)}
                plan.append(Run(variant, seed, request, split, configs, trainings))
    _warn_of_variants(variants, changes, plan)
    _check_version(study.workdir / "versions.json")
    for layout in (ABLATION, CROSS_VALIDATION):
        if layout is not study.layout and any(study.workdir.glob(f"{layout.reports}/run.json")):
            raise InputError(f"{study.workdir}: holds a study by another script; choose a new `workdir`")
    _check_data(study, cases, requests)
    return plan


def _check_split(split: Split, cases: Sequence[Case], request: SplitRequest, *, with_infection: bool) -> None:
    try:
        used = [*split.cases("train", cases), *split.cases("test", cases)]
    except InputError as error:
        raise InputError(f"{request.split_file or split.protocol}: {error}") from error
    if with_infection:
        require_infection_masks([*used, *(case for case in cases if case.id in split.val)])


def _warn_of_variants(variants: Sequence[Variant], changes: Mapping[str, Any], plan: Sequence[Run]) -> None:
    """Names what the variants decide against the changes of all, and those that do not differ."""
    for variant in variants:
        own = {**variant.lung, **(variant.infection or {})}
        if kept := [path for path, value in own.items() if changes.get(path, value) != value]:
            logger.warning("variant %r keeps its own %s, whatever is given for all", variant.name, ", ".join(kept))
    names: dict[str, list[str]] = {}
    for run in plan:
        if run.variant.name not in names.setdefault(run.key, []):
            names[run.key].append(run.variant.name)
    for same in dict.fromkeys(tuple(group) for group in names.values() if len(group) > 1):
        logger.warning("variants %s are the same with these settings", " and ".join(map(repr, same)))


def _check_initial(study: Study, variants: Sequence[Variant]) -> None:
    """Refuses models to begin with that nothing would begin with, or not what a variant's name says."""
    if "infection" in study.initial and all(variant.infection is None for variant in variants):
        raise InputError("`initial_infection_checkpoint`: no variant has an infection model; leave it out")
    for variant in variants:
        if "infection" in study.initial and "cascade.start_from_lung" in (variant.infection or {}):
            raise InputError(
                f"variant {variant.name!r}: its infection models would all begin with `initial_infection_checkpoint`; "
                "leave one of the two out"
            )


def _check_configs(variant: Variant, configs: Mapping[Structure, Config], study: Study) -> dict[Structure, str]:
    """Refuses what a training would, before the first one begins; fingerprints of the models to begin with, or ""."""
    tables, initial_fingerprints = study.tables, dict.fromkeys(configs, "")
    for structure, config in configs.items():
        try:
            check_settings(config, tables.losses, tables.augmentations, tables.architectures)
            if structure in study.initial:
                initial = load_initial(config, study.initial[structure], tables.architectures)
                initial_fingerprints[structure] = fingerprint(initial.variables)
        except InputError as error:
            raise InputError(f"{variant.name}, {config.task}: {error}") from error
    lung, infection = configs["lung"], configs.get("infection")
    if infection and infection.task == "infection" and not lung.preprocess.can_feed(infection.preprocess):
        raise InputError(
            f"{variant.name}: slices of the lung model are prepared by {lung.preprocess}, those of the infection model "
            f"by {infection.preprocess}; they may differ in context_mm alone"
        )
    return initial_fingerprints


def _check_data(study: Study, cases: Sequence[Case], splits: Iterable[Split]) -> None:
    """Refuses data of which a report may show another state; notes what a new study, or what is new in it, uses."""
    used = {case_id for split in splits for case_id in (*split.train, *split.val, *split.test)}
    some = [case for case in cases if case.id in used]
    digests = content_digests(some, study.tables.readers, assumed=study.assumed)
    digests |= {f"{case.id} (patient)": case.patient for case in some}  # intervals are over patients
    with _begin_alone(study.workdir):
        check_data_unchanged(study.workdir, digests)
        write_data_record(study.workdir, digests)


def _begin_alone(workdir: Path) -> contextlib.AbstractContextManager[Any]:
    """For what one process of several that begin a study together may check and write at a time."""
    make_output_dir(workdir / _RUNNING)
    return FileLock(workdir / _RUNNING / "begin.lock")


def _check_version(file: Path) -> None:
    """Refuses a study of a version with other results under the same keys; notes the versions that begin a new one."""
    if not file.is_file():
        make_output_dir(file.parent)
        write_json(file, versions())
    begun_by = read_json(file, "choose a new `workdir`", "resunet-jax")["resunet-jax"]
    if [int(number) for number in re.findall(r"\d+", begun_by)] < _SAME_RESULTS_SINCE:
        raise InputError(
            f"{file.parent}: was begun by resunet_jax {begun_by}, whose results differ; finish it with that "
            "version, or choose a new `workdir`"
        )


def run_study(study: Study, plan: Sequence[Run]) -> dict[str, table.Record]:
    """Trains and tests what is left of a plan; resumes what was killed.

    Of runs with one key one is done, and a model is trained once for all runs that train it alike. A run is done when
    its report is there, which is written atomically; one that lacks only that, or whose report lacks a metric of the
    table, is tested, not trained. Each process takes runs that no other is at, and all return the same.

    Returns:
      by key of the run its record, as in runs.jsonl, which lists all runs of the workdir: "key", "variant", "seed",
      "split", "volumes" and "settings" (see `Evaluation`), "cost" (of the trainings), "folders" (of the models) and
      "slices" (see `save_slices`).

    Raises:
      InputError: see `train` and `evaluate`.
      StoppedError: see `fit`.
    """
    left: dict[str, Run] = {}
    for run in plan:
        left.setdefault(run.key, run)
    titles = {
        key: f"run {number} of {len(left)}: {run.variant.name}, seed {run.seed}, {run.split.protocol or 'split file'}"
        for number, (key, run) in enumerate(left.items(), start=1)
    }
    log_once = functools.cache(logger.info)
    while left:
        held = {}
        for key, run in left.items():
            if study.should_stop(0):
                raise StoppedError(f"{study.workdir}: stopped; the same command resumes")
            try:
                with dir_lock(study.workdir / _RUNNING / key):
                    if _is_done(study.report(run), study.tables.metrics):
                        log_once("%s: done", titles[key])
                    else:
                        log_once("%s", titles[key])
                        _run(study, run)
                        _write_runs(study)
            except LockedError:
                log_once("%s: left to another process, which is at it or at a model of it", titles[key])
                held[key] = run
        if len(held) == len(left):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        left = held
    _write_runs(study)  # complete, whatever processes that ended together wrote
    return {run.key: _read_record(study.report(run)) for run in plan}


def _read_record(report: Path) -> dict[str, Any]:
    remedy = f"delete {report}, the run is tested again"
    return read_json(report / "run.json", remedy, "key", "seed", "split", "volumes", "settings", "cost", "slices")


def _write_runs(study: Study) -> None:
    def line(file: Path) -> tuple[int, str]:
        return file.stat().st_mtime_ns, json.dumps(_read_record(file.parent)) + "\n"

    found = []
    for file in study.workdir.glob(f"{study.layout.reports}/run.json"):
        try:
            found.append(line(file))
        except (FileNotFoundError, InputError):  # another process may be putting a new one in its place
            if file.is_file():
                found.append(line(file))
    write_text(study.workdir / "runs.jsonl", "".join(line for _, line in sorted(found)))


def _is_done(report: Path, metrics: Mapping[str, Metric]) -> bool:
    done = (report / "run.json").is_file()
    return done and all(set(metrics) <= set(row) for row in _read_record(report)["volumes"])


def _run(study: Study, run: Run) -> None:
    """Trains what is not trained yet, tests it, and leaves the report with the run's record."""
    cost = {task: _train(study, run, task) for task in run.trainings}
    report, lung = study.report(run), run.configs["lung"]
    evaluation = evaluate(
        study.data_dir,
        study.cache_dir,
        output_dir=report,
        lung_checkpoint=study.model(run, "lung"),
        infection_checkpoint=study.model(run, "infection") if "infection" in run.configs else None,
        batch_size=lung.train.batch_size,
        thresholds={structure: config.postprocess.threshold for structure, config in run.configs.items()},
        min_component_fraction=lung.postprocess.min_component_fraction,
        assumed=study.assumed,
        max_cache_gb=study.max_cache_gb,
        **study.tables.for_evaluation,
    )
    with atomic_dir(report) as partial:
        write_report(evaluation, partial)
        record = {
            "key": run.key,
            "variant": run.variant.name,
            "row": run.variant.name,  # its name in 0.6.0
            "seed": run.seed,
            "split": dataclasses.asdict(run.split),
            "volumes": [with_legacy_keys(row) for row in evaluation.volumes],
            "settings": evaluation.settings,
            "cost": cost,
            "folders": {task: study.layout.model(run, task) for task in run.configs},
            "slices": table.save_slices(partial / "slices.npz", evaluation.overlays),
        }
        write_json(partial / "run.json", record)
        remove_dir(report)  # one that lacks a metric, or has no record


def _train(study: Study, run: Run, task: Structure) -> dict[str, float]:
    """Trains a model that is not trained yet; what that cost."""
    file, names = study.model(run, task) / "cost.json", ("steps", "seconds_per_step", "parameters", "step_gb")
    with dir_lock(study.workdir / _RUNNING / f"{task}-{run.training_key(task)}"):
        if not file.is_file():
            with tensorboard_writer(file.parent, wanted=study.tensorboard) as on_epoch:
                history = train(
                    run.trainings[task],
                    study.data_dir,
                    file.parent,
                    study.cache_dir,
                    split=run.request,
                    lung_checkpoint=study.model(run, "lung") if task == "infection" else None,
                    initial_checkpoint=study.initial.get(task),
                    should_stop=study.should_stop,
                    on_epoch=on_epoch,
                    assumed=study.assumed,
                    max_cache_gb=study.max_cache_gb,
                    **study.tables.for_training,
                )
            without_compiling = history[1:] or history
            seconds = float(np.median([1 / record["steps_per_second"] for record in without_compiling]))
            write_json(file, dict(zip(names, (history[-1]["step"], seconds, *_size(study, run, task)), strict=True)))
    return read_json(file, "delete it", *names)


def _size(study: Study, run: Run, task: Structure) -> tuple[int, float]:
    """Parameters, and GB of a step by the compiler's plan; those of the process would count the models before it."""
    fed: list[Structure] = ["lung"] if task == "infection" else []
    configs = tuple(override(run.trainings[t], {"train.seed": 0}) for t in (task, *fed))
    if configs not in study.sizes:  # compiling takes as long as many steps
        tables = {name: table for name, table in study.tables.for_training.items() if name != "readers"}
        step, state = compile_train_step(*configs, **tables)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"]))
        study.sizes[configs] = parameters, step.memory_analysis().temp_size_in_bytes / 1e9
    return study.sizes[configs]


def ablate(
    study: Study,
    variants: Sequence[Variant],
    *,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    splits: Sequence[SplitRequest],
) -> dict[str, Any]:
    """Trains and tests variants, see `begin_study` and `run_study`, and compares them with the first one.

    The workdir gets lung/, infection/, reports/, runs.jsonl, versions.json, data.json, summary.json, table.md,
    differences.png, cases.png (Dice of each volume) and comparison.png (a slice of the first variant's best, median and
    worst volume, by the first seed); the last two show the first four variants.

    Returns:
      what summary.json holds: "rows" (see `summarize_runs`), "seeds", "splits", "seen_patients" (see there).

    Raises:
      InputError: variants, data or workdir are not fit for it; the first variant has both models unless none does.
      StoppedError: see `fit`.
    """
    if variants[0].infection is None and any(variant.infection is not None for variant in variants):
        raise InputError(f"variant {variants[0].name!r} has no infection model; put another variant first")
    plan = begin_study(study, variants, changes, seeds, splits)
    records = run_study(study, plan)
    runs = {variant.name: [run for run in plan if run.variant is variant] for variant in variants}
    rows = table.summarize_runs({name: [records[run.key] for run in own] for name, own in runs.items()})
    summary = {
        "rows": [with_legacy_keys(row) for row in rows],
        "seeds": list(dict.fromkeys(seeds)),
        "splits": [s.protocol or f"test {', '.join(s.test)}" for s in dict.fromkeys(run.split for run in plan)],
        "seen_patients": table.seen_patients([records[run.key] for run in plan]),
    }
    write_json(study.workdir / "summary.json", summary)
    write_text(study.workdir / "table.md", table.to_markdown(summary))
    save_differences(study.workdir / "differences.png", rows)
    save_cases(study.workdir / "cases.png", rows[:_MOST_COMPARED])
    compared = [v for v in variants if (v.infection is None) == (variants[0].infection is None)][:_MOST_COMPARED]
    first_seed = {v.name: [run for run in runs[v.name] if run.seed == seeds[0]] for v in compared}
    slices = {
        name: [s for r in own for s in table.load_slices(study.report(r) / "slices.npz", records[r.key]["slices"])]
        for name, own in first_seed.items()
    }
    save_comparison(study.workdir / "comparison.png", slices)
    return summary


def cross_validate(
    study: Study,
    variant: Variant,
    *,
    protocol: Protocol,
    changes: Mapping[str, Any],
    seed: int = 0,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Trains and tests both models of one variant on every fold, see `begin_study`, `run_study` and `make_split`.

    The workdir gets fold_0/ to fold_4/, each with lung/, infection/ and report/, cross_validation.json (the settings),
    runs.jsonl, versions.json and data.json; then summary.json, volumes.csv, boxes.png and volumes.png over all folds.

    Returns:
      what summary.json holds, see `summarize_folds`.

    Raises:
      InputError: data or workdir are not fit for it.
      StoppedError: see `fit`.
    """
    study = dataclasses.replace(study, layout=CROSS_VALIDATION)
    folds = [SplitRequest(protocol=protocol, fold=fold, allow_missing=allow_missing) for fold in range(NUM_FOLDS)]
    plan = begin_study(study, [variant], changes, [seed], folds)
    _check_plan(study.workdir / "cross_validation.json", plan)
    records = run_study(study, plan)
    results = table.summarize_folds([records[run.key] for run in plan], study.tables.metrics)
    summary = {structure: with_legacy_keys(row) for structure, row in results["summary"].items()}
    write_json(study.workdir / "summary.json", {**results, "summary": summary})
    volumes, note = results["volumes"], results["protocol"]
    write_csv(study.workdir / "volumes.csv", [{**row, "protocol": note} for row in volumes])
    save_boxes(study.workdir / "boxes.png", volumes, note)
    save_volumes(study.workdir / "volumes.png", volumes, note)
    return results


def _check_plan(file: Path, plan: Sequence[Run]) -> None:
    """Writes what a cross-validation runs, or refuses the workdir of another one."""
    keys = [run.key for run in plan]
    configs = {task: to_dict(config) for task, config in plan[0].configs.items()}
    with _begin_alone(file.parent):
        if not file.is_file():
            write_json(file, {**configs, "splits": [dataclasses.asdict(run.split) for run in plan], "keys": keys})
    if read_json(file, "choose a new `workdir`", "keys")["keys"] != keys:
        raise InputError(f"{file}: is of other settings or cases; choose a new `workdir`")
