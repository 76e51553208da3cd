"""Recipes side by side: the same cases, steps and seeds, one thing changed at a time."""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resunet_jax.config import Config, Target, changed_fields, override
from resunet_jax.data.cases import find_cases, require_infection_masks
from resunet_jax.data.splits import Split, SplitRequest, make_split
from resunet_jax.data.volumes import Array
from resunet_jax.errors import HeldError, InputError, StoppedError
from resunet_jax.evaluation.ablation_table import summarize_runs, to_markdown
from resunet_jax.evaluation.evaluate import nan_to_none
from resunet_jax.evaluation.report import write_report
from resunet_jax.evaluation.run import evaluate
from resunet_jax.figures import Overlay, save_cases, save_comparison, save_differences
from resunet_jax.files import check_output_dir, locked, make_output_dir, whole_folder, write_text
from resunet_jax.progress import logger
from resunet_jax.recipes import RecipeName, recipe
from resunet_jax.training.checkpoints import History
from resunet_jax.training.fit import never
from resunet_jax.training.run import train, versions
from resunet_jax.training.steps import compile_train_step

RUNS = "runs.jsonl"
"""File of a workdir with one JSON line a run: what lies in the report of each."""

_LINE = "run.json"
_SLICES = "slices.npz"
_MOST_COMPARED = 4
_SECONDS_BETWEEN_LOOKS = 5.0  # at what other processes have done

_KEPT = ("case", "patient", "structure", "dice", "nsd", "lesion_recall", "false_lesions", "reference_lung_part")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, and what is changed in it.

    Attributes:
      name: in the table.
      recipe: to start from.
      lung: changes of the lung model's config, see `override`.
      infection: changes of the infection model's; None trains and tests the lung model alone.
    """

    name: str
    recipe: RecipeName = "robust"
    lung: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    infection: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)


_BCE = {"train.loss": "bce"}
_SLICE_DICE = {"train.loss": "bce_dice"}
_STEPS = {"train.schedule": "step", "train.learning_rate": 1e-4, "train.weight_decay": 0.0}
_SAME_GREY = dict.fromkeys(
    ("augment.max_contrast", "augment.max_brightness", "augment.max_gamma", "augment.max_noise"), 0.0
)
_MOVES = {
    "augment.vertical_flip": 0.4,
    "augment.horizontal_flip": 0.4,
    "augment.quarter_turn": 0.2,
    "augment.rotation": 0.3,
    "augment.max_rotation_deg": 0.0,
    "augment.max_zoom": 0.0,
}
_MINMAX = {"preprocess.normalization": "minmax"}
_ONE_WINDOW = {"preprocess.normalization": "window"}

ROWS: tuple[Row, ...] = (
    Row("robust"),
    Row("original", "original"),
    Row("infection: lung probability as it comes", infection={"model.lung_closing": 0.0}),
    Row("infection: no lesions made denser", infection={"augment.consolidation": 0.0}),
    Row("infection: no lesions made fainter", infection={"augment.fading": 0.0}),
    Row("infection: cross-entropy alone", infection=_BCE),
    Row("infection: Dice of each slice", infection=_SLICE_DICE),
    Row("infection: the original's optimizer", infection=_STEPS),
    Row("infection: the original's moves", infection=_MOVES),
    Row("infection: grey values as they are", infection=_SAME_GREY),
    Row("lung: cross-entropy alone", lung=_BCE, infection=None),
    Row("lung: the original's optimizer", lung=_STEPS, infection=None),
    Row("lung: the original's moves", lung=_MOVES, infection=None),
    Row("lung: grey values as they are", lung=_SAME_GREY, infection=None),
    Row("lung: small regions stay", lung={"predict.smallest_region": 0.0}, infection=None),
    Row("both: per-slice min–max", lung=_MINMAX, infection=_MINMAX),
    Row("both: air where the file has it", lung=_ONE_WINDOW, infection=_ONE_WINDOW),
)
"""The table: the default recipe, the original, and the default with one thing otherwise."""


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows of `ROWS` by name, in the order of the names; all of them where there is none.

    Raises:
      InputError: a name is not known.
    """
    by_name = {row.name: row for row in ROWS}
    for name in names:
        if name not in by_name:
            raise InputError(f"row {name!r}: there is none of that name; there are {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(ROWS)


class Run(NamedTuple):
    """One line of runs.jsonl to be: a row, trained and tested once."""

    row: Row
    seed: int
    request: SplitRequest
    split: Split
    configs: dict[Target, Config]

    @property
    def key(self) -> str:
        """Tells runs apart by all that decides their result."""
        return self.digest(*self.configs.values())

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.row.name}, seed {self.seed}, {self.split.protocol or 'split file'}"

    @property
    def trainings(self) -> dict[Target, Config]:
        """What to train; rows that differ in how lung masks are made, and in nothing else, share a lung model."""
        predict = recipe(self.row.recipe, "lung").predict
        return {**self.configs, "lung": dataclasses.replace(self.configs["lung"], predict=predict)}

    def digest(self, *configs: Config) -> str:
        """Tells models apart that are trained by some configs on these cases, however they were chosen."""
        values = [*map(changed_fields, configs), dataclasses.asdict(dataclasses.replace(self.split, protocol=""))]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def ablate(
    rows: Sequence[Row],
    data_dir: Path,
    workdir: Path,
    cache_dir: Path,
    *,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    splits: Sequence[SplitRequest],
    should_stop: Callable[[int], bool] = never,
) -> dict[str, Any]:
    """Trains and tests every row with every seed on every split; goes on where it was killed.

    A lung model is trained once for all rows that train it alike. A run is done when its report is there, which is
    written last and whole; a done run is not run again, and one that lacks only its report is tested again, not
    trained. Several processes may do this in one workdir: each takes runs that no other is at, and all end with the
    same table.

    Args:
      rows: the first is what the others are compared with, so it trains both models unless none does.
      data_dir: see `find_cases`.
      workdir: gets lung/ and infection/ with the trainings, reports/, runs.jsonl, summary.json, table.md,
        differences.png, cases.png (each volume's Dice), comparison.png (a slice of the first row's best, median and
        worst case, by the first seed) and versions.json; the last two pictures show the first four rows.
      cache_dir: see `prepare_cases`.
      changes: of every row, before its own; see `override`.
      seeds: of the trainings.
      splits: each is tested on its test cases; without validation cases the last epoch is.
      should_stop: see `fit`; also asked, with 0, while other processes are waited for.

    Returns:
      what summary.json holds: "rows" (see `summarize_runs`), "seeds", "splits".

    Raises:
      InputError: rows, data or workdir are not fit for it.
      StoppedError: see `fit`.
    """
    check_output_dir(workdir)
    if rows[0].infection is None and any(row.infection is not None for row in rows):
        raise InputError(f"row {rows[0].name!r} has no infection model to compare with; put another row first")
    cases = find_cases(data_dir)
    require_infection_masks(cases)
    made = [(request, make_split(cases, request)) for request in splits]
    for _, split in made:
        split.cases("test", cases)
    plan = [
        Run(row, seed, request, split, configs(row, changes, seed))
        for seed in seeds
        for request, split in made
        for row in rows
    ]
    make_output_dir(workdir)
    write_text(workdir / "versions.json", json.dumps(versions(), indent=2, ensure_ascii=False) + "\n")
    _run_all(plan, data_dir, workdir, cache_dir, should_stop)
    lines = _write_lines(workdir)  # whole, whatever processes that ended together wrote
    summary: dict[str, Any] = {
        "rows": summarize_runs({row.name: _of(row, plan, lines) for row in rows}),
        "seeds": list(seeds),
        "splits": [split.protocol or f"test {', '.join(split.test)}" for _, split in made],
    }
    write_text(workdir / "summary.json", json.dumps(nan_to_none(summary), indent=2, ensure_ascii=False) + "\n")
    write_text(workdir / "table.md", to_markdown(summary))
    save_differences(workdir / "differences.png", summary["rows"])
    save_cases(workdir / "cases.png", summary["rows"][:_MOST_COMPARED])
    _compare_slices(workdir, rows[:_MOST_COMPARED], [run for run in plan if run.seed == seeds[0]])
    return summary


def _run_all(
    plan: Sequence[Run], data_dir: Path, workdir: Path, cache_dir: Path, should_stop: Callable[[int], bool]
) -> None:
    """Does what is left of a plan; a run or lung model that another process is at is left to it, and waited for."""
    left = {f"run {number} of {len(plan)}: {run.title}": run for number, run in enumerate(plan, start=1)}
    started: set[str] = set()
    while left:
        held = {}
        for title, run in left.items():
            try:
                with locked(workdir / ".running" / run.key):
                    if (workdir / "reports" / run.key / _LINE).is_file():
                        logger.info("%s: done before", title)
                        continue
                    if title not in started:
                        logger.info("%s", title)
                        started.add(title)
                    _run(run, data_dir, workdir, cache_dir, should_stop=should_stop)
                    _write_lines(workdir)
            except HeldError:
                if title not in started:
                    logger.info("%s: another process is at it, or at its lung model", title)
                    started.add(title)
                held[title] = run
        if len(held) == len(left):
            if should_stop(0):
                raise StoppedError(f"{workdir}: stopped; the same command goes on from there")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        left = held


def _of(row: Row, plan: Sequence[Run], lines: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [lines[run.key] for run in plan if run.row is row]


def configs(row: Row, changes: Mapping[str, Any], seed: int) -> dict[Target, Config]:
    """The configs of a row's trainings, in their order; see `ablate`."""
    own: dict[Target, Mapping[str, Any] | None] = {"lung": row.lung, "infection": row.infection}
    return {
        task: override(recipe(row.recipe, task), {**changes, **mine, "train.seed": seed}, f"row {row.name!r}")
        for task, mine in own.items()
        if mine is not None
    }


def _read(workdir: Path) -> dict[str, dict[str, Any]]:
    """The lines of all runs that are done, by key, in the order in which they were."""
    files = [file for file in (workdir / "reports").glob(f"*/{_LINE}") if not file.parent.name.startswith(".")]
    lines = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        try:
            line = json.loads(file.read_text(encoding="utf-8"))
            lines[line["key"]] = line
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged ({error}); delete {file.parent}, the run is tested again") from error
    return lines


def _write_lines(workdir: Path) -> dict[str, dict[str, Any]]:
    """Puts runs.jsonl together, and returns what `_read` does."""
    lines = _read(workdir)
    write_text(workdir / RUNS, "".join(json.dumps(line) + "\n" for line in lines.values()))
    return lines


def _run(run: Run, data_dir: Path, workdir: Path, cache_dir: Path, *, should_stop: Callable[[int], bool]) -> None:
    """Trains what is not trained yet, tests it, and leaves the report with the run's line."""
    folders = {
        task: workdir / task / (run.key if task == "infection" else run.digest(config))
        for task, config in run.trainings.items()
    }
    names = {task: folder.relative_to(workdir).as_posix() for task, folder in folders.items()}
    cost: dict[Target, dict[str, float]] = {}
    for line in _read(workdir).values():
        if line["folders"]["lung"] == names["lung"]:  # a lung model that was tested is trained
            cost["lung"] = line["cost"]["lung"]
    for task, config in run.trainings.items():
        if task not in cost:
            uses_lung = task == "infection"
            lung = folders["lung"] if uses_lung else None
            history = train(
                config,
                data_dir,
                folders[task],
                cache_dir,
                split=run.request,
                lung_checkpoint=lung,
                should_stop=should_stop,
            )
            cost[task] = _cost(config, run.trainings["lung"] if uses_lung else None, history)
    report = workdir / "reports" / run.key
    evaluation = evaluate(
        data_dir,
        cache_dir,
        output_dir=report,
        lung_checkpoint=folders["lung"],
        infection_checkpoint=folders.get("infection"),
        batch_size=run.configs["lung"].train.batch_size,
        smallest_region=run.configs["lung"].predict.smallest_region,
    )
    line = {
        "key": run.key,
        "row": run.row.name,
        "seed": run.seed,
        "split": dataclasses.asdict(run.split),
        "volumes": nan_to_none([{name: row[name] for name in _KEPT} for row in evaluation.volumes]),
        "cost": cost,
        "folders": names,
    }
    shutil.rmtree(report, ignore_errors=True)  # one without a line
    with whole_folder(report) as partial:
        write_report(evaluation, partial)
        _save_slices(partial / _SLICES, evaluation.overlays)
        write_text(partial / _LINE, json.dumps(line) + "\n")


def _cost(config: Config, lung: Config | None, history: History) -> dict[str, float]:
    return {
        "steps": history[-1]["step"],
        "seconds_per_step": float(np.median([1 / record["steps_per_second"] for record in history])),
        **_size(_any_seed(config), lung and _any_seed(lung)),
    }


def _any_seed(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))


@functools.cache  # compiling takes as long as many steps
def _size(config: Config, lung: Config | None) -> dict[str, float]:
    """The compiler's plan tells memory, which a process that trains one model after the other cannot."""
    step, state = compile_train_step(config, lung)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"])),
        "step_gb": step.memory_analysis().temp_size_in_bytes / 1e9,
    }


def _save_slices(file: Path, overlays: Sequence[tuple[float, Overlay]]) -> None:
    """The slices of an evaluation that are worth a picture, to be drawn beside those of other runs."""
    arrays: dict[str, Any] = {}
    for number, (dice, overlay) in enumerate(overlays):
        arrays |= {f"{number}.title": overlay.title, f"{number}.dice": dice, f"{number}.image": overlay.image}
        for kind, masks in (("reference", overlay.reference), ("predicted", overlay.predicted)):
            arrays |= {f"{number}.{kind}.{name}": mask for name, mask in masks.items()}
    np.savez_compressed(file, allow_pickle=False, **arrays)


def _load_slices(file: Path) -> list[tuple[float, Overlay]]:
    def masks(number: int, kind: str) -> dict[str, Array]:
        prefix = f"{number}.{kind}."
        return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return [
                (
                    float(arrays[f"{number}.dice"]),
                    Overlay(
                        str(arrays[f"{number}.title"]),
                        arrays[f"{number}.image"],
                        masks(number, "reference"),
                        masks(number, "predicted"),
                    ),
                )
                for number in range(sum(name.endswith(".title") for name in arrays))
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: damaged ({error}); delete {file.parent}, the run is tested again") from error


def _compare_slices(workdir: Path, rows: Sequence[Row], plan: Sequence[Run]) -> None:
    """Draws the same slices by several rows side by side."""
    by_row = {
        row.name: [
            pair for run in plan if run.row is row for pair in _load_slices(workdir / "reports" / run.key / _SLICES)
        ]
        for row in rows
    }
    first = by_row[rows[0].name]
    ranked = sorted((i for i in range(len(first)) if not math.isnan(first[i][0])), key=lambda i: -first[i][0])
    picks = dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1])) if ranked else [0]
    save_comparison(workdir / "comparison.png", {name: [slices[i] for i in picks] for name, slices in by_row.items()})
