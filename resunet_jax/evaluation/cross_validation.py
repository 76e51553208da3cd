"""Lung and infection model for every fold of a protocol, and one table over all test volumes."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.table import Table

from resunet_jax.config import Config, to_dict
from resunet_jax.data.cases import KNOWN_CASES, find_cases, require_infection_masks
from resunet_jax.data.splits import FOLDS, SplitRequest, make_split
from resunet_jax.errors import InputError
from resunet_jax.evaluation.evaluate import STRUCTURES, nan_to_none, summarize
from resunet_jax.evaluation.published import PUBLISHED, Published
from resunet_jax.evaluation.report import wide_console, write_csv, write_report
from resunet_jax.evaluation.run import evaluate
from resunet_jax.figures import save_boxes, save_volumes
from resunet_jax.files import check_output_dir, locked, make_output_dir, whole_folder, write_text
from resunet_jax.progress import logger
from resunet_jax.training.fit import never
from resunet_jax.training.run import train, versions

Protocol = Literal["few_shot", "five_fold", "patient_five_fold"]

_SETTINGS = "cross_validation.json"
_REPORT = "report"


def cross_validate(
    lung: Config,
    infection: Config,
    data_dir: Path,
    workdir: Path,
    cache_dir: Path,
    *,
    protocol: Protocol,
    allow_missing: bool = False,
    should_stop: Callable[[int], bool] = never,
) -> dict[str, Any]:
    """Trains and tests both models of the cascade on every fold; goes on where it was killed.

    A fold is done when its report is there, which is written last and whole; a done fold is not run again.

    Args:
      lung: config of the lung trainings.
      infection: config of the infection trainings.
      data_dir: see `find_cases`.
      workdir: gets fold_0/ to fold_4/, each with lung/, infection/ and report/; then summary.json, volumes.csv,
        boxes.png and volumes.png over all folds.
      cache_dir: see `prepare_cases`.
      protocol: "few_shot", "five_fold" or "patient_five_fold".
      allow_missing: see `make_split`.
      should_stop: see `fit`.

    Returns:
      what summary.json holds: "protocol", "cases" (how many), "full_set", "settings", "volumes" (a row a fold, case and
      structure), "summary" (see `summarize`) and "published".

    Raises:
      InputError: data or workdir are not fit for it.
      StoppedError: see `fit`.
    """
    check_output_dir(workdir)
    cases = find_cases(data_dir)
    require_infection_masks(cases)
    requests = [SplitRequest(protocol=protocol, fold=fold, allow_missing=allow_missing) for fold in range(FOLDS)]
    splits = [make_split(cases, request) for request in requests]  # all of them before the first is trained
    with locked(workdir):
        _check_settings(workdir, lung, infection, [dataclasses.asdict(split) for split in splits])
        for fold, request in enumerate(requests):
            folder = workdir / f"fold_{fold}"
            if (folder / _REPORT).is_dir():
                logger.info("fold %d of %d: done before", fold, FOLDS)
            else:
                logger.info("fold %d of %d: %s", fold, FOLDS, splits[fold].protocol)
                _run_fold(lung, infection, data_dir, folder, cache_dir, split=request, should_stop=should_stop)
        results = _collect(workdir, protocol, [case.id for case in cases], splits[0].protocol)
        _write(workdir, results)
    return results


def _check_settings(workdir: Path, lung: Config, infection: Config, splits: Sequence[Mapping[str, Any]]) -> None:
    """Writes what is run, or refuses a folder that holds something else."""
    file = workdir / _SETTINGS
    values = json.loads(json.dumps({"lung": to_dict(lung), "infection": to_dict(infection), "splits": splits}))
    if file.is_file():
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({error}); choose a new --workdir") from error
        if old != values:
            raise InputError(
                f"{workdir} holds a cross-validation of other settings or cases (see {file}); choose a new --workdir"
            )
        return
    make_output_dir(workdir)
    write_text(file, json.dumps(values, indent=2) + "\n")
    write_text(workdir / "versions.json", json.dumps(versions(), indent=2, ensure_ascii=False) + "\n")


def _run_fold(
    lung: Config,
    infection: Config,
    data_dir: Path,
    folder: Path,
    cache_dir: Path,
    *,
    split: SplitRequest,
    should_stop: Callable[[int], bool],
) -> None:
    lung_dir, infection_dir = folder / "lung", folder / "infection"
    run = functools.partial(train, split=split, should_stop=should_stop)
    run(lung, data_dir, lung_dir, cache_dir)
    run(infection, data_dir, infection_dir, cache_dir, lung_checkpoint=lung_dir)
    evaluation = evaluate(
        data_dir,
        cache_dir,
        output_dir=folder / _REPORT,
        lung_checkpoint=lung_dir,
        infection_checkpoint=infection_dir,
        batch_size=infection.train.batch_size,
    )
    with whole_folder(folder / _REPORT) as partial:
        write_report(evaluation, partial)


def _collect(workdir: Path, protocol: Protocol, cases: Sequence[str], first: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for fold in range(FOLDS):
        file = workdir / f"fold_{fold}" / _REPORT / "metrics.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            rows += [{"fold": fold, **_none_to_nan(row)} for row in values["volumes"]]
            settings = {name: values["settings"][name] for name in ("threshold", "tolerance_mm")}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{file}: damaged ({error}); delete {file.parent}, the fold is tested again") from error
    full_set = set(cases) == set(KNOWN_CASES)
    return {
        "protocol": first.replace(f"fold 0 of {FOLDS}", f"{FOLDS} folds"),
        "cases": len(cases),
        "full_set": full_set,
        "settings": settings,
        "volumes": rows,
        "summary": summarize(rows),
        "published": [
            {**row._asdict(), "remark": remark(row, protocol, full_set)}
            for row in sorted(PUBLISHED, key=lambda row: STRUCTURES.index(row.structure))
        ],
    }


def remark(row: Published, protocol: str, full_set: bool) -> str:
    """What keeps a published row from being compared with a run of ours; empty if nothing does."""
    remarks = [] if row.same_cases and full_set else ["different data"]
    if row.protocol != protocol:
        remarks.append("different protocol")
    return "; ".join([*remarks, *([row.remark] if row.remark else [])])


def _write(workdir: Path, results: Mapping[str, Any]) -> None:
    write_text(workdir / "summary.json", json.dumps(nan_to_none(dict(results)), indent=2, ensure_ascii=False) + "\n")
    write_csv(workdir / "volumes.csv", [{**row, "protocol": results["protocol"]} for row in results["volumes"]])
    save_boxes(workdir / "boxes.png", results["volumes"], ("dice", "nsd"), results["protocol"])
    save_volumes(workdir / "volumes.png", results["volumes"], results["protocol"])


def print_cross_validation(results: Mapping[str, Any]) -> None:
    """A row a structure of this run beside the published ones."""
    console = wide_console()
    tolerance = results["settings"]["tolerance_mm"]
    console.print(f"Protocol: {results['protocol']}; {results['cases']} cases")
    console.print(
        f"Means over volumes; surface Dice (NSD) at {tolerance['lung']:g} mm, infection {tolerance['infection']:g} mm"
    )
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("structure", "who", "protocol", "Dice", "SD", "95 % of the mean", "NSD", "volumes", "remark"):
        table.add_column(name, justify="right" if name in ("Dice", "SD", "NSD", "volumes") else "left")
    for structure, metrics in results["summary"].items():
        dice, nsd = metrics["dice"], metrics["nsd"]
        interval = "–" if math.isnan(dice["ci_low"]) else f"{dice['ci_low']:.3f} to {dice['ci_high']:.3f}"
        volumes = f"{dice['volumes'] - dice['undefined']} of {dice['volumes']}"
        numbers = (_number(dice["mean"]), _number(dice["sd"]), interval, _number(nsd["mean"]), volumes)
        table.add_row(structure, "this run", results["protocol"].split(",")[0], *numbers, "")
        for row in results["published"]:
            if row["structure"] == structure:
                published = (_number(row["dice"]), "", "", _number(row["nsd"]), "")
                table.add_row("", row["source"], row["protocol"], *published, row["remark"])
        table.add_section()
    console.print(table)


def _none_to_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
