"""One training run from data folder to workdir: a folder that explains itself."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resunet_jax import figures
from resunet_jax.config import Config, from_dict, to_dict
from resunet_jax.data.cases import find_cases, require_infection_masks
from resunet_jax.data.pipeline import SliceSource
from resunet_jax.data.prepared import PreparedCase, prepare_cases
from resunet_jax.data.splits import DEFAULT_SPLIT, Split, SplitRequest, make_split, read_split, write_split
from resunet_jax.data.volumes import Array, FloatArray, read_volume
from resunet_jax.errors import InputError
from resunet_jax.evaluation.metrics import choose_threshold
from resunet_jax.files import check_output_dir, locked, make_output_dir, write_text
from resunet_jax.model.cascade import infection_input, predict_probability
from resunet_jax.progress import logger
from resunet_jax.training.augment import augment
from resunet_jax.training.checkpoints import (
    CHECKPOINTS,
    History,
    LoadedModel,
    fingerprint,
    load_model,
    load_model_for,
    save_threshold,
)
from resunet_jax.training.devices import is_primary, make_mesh, wait_for_all
from resunet_jax.training.fit import fit, never
from resunet_jax.training.tasks import TASKS, Task

_PACKAGES = (
    "resunet-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "nibabel",
    "scipy",
)
_MAX_OVERLAYS = 6


def train(
    config: Config,
    data_dir: Path,
    workdir: Path,
    cache_dir: Path,
    *,
    split: SplitRequest = DEFAULT_SPLIT,
    lung_checkpoint: Path | None = None,
    devices: int | None = 1,
    should_stop: Callable[[int], bool] = never,
) -> History:
    """Trains a model, or goes on where the workdir's latest checkpoint left off.

    Args:
      config: what to train and how; `lung_fingerprint` is filled in here.
      data_dir: see `find_cases`.
      workdir: gets config.json, split.json, versions.json, metrics.jsonl, threshold.json, checkpoints/ and figures/.
      cache_dir: see `prepare_cases`.
      split: see `make_split`; without validation cases all epochs are trained and the last is kept.
      lung_checkpoint: for task "infection", the lung model that feeds it.
      devices: how many share a batch, None for all; see `make_mesh`.
      should_stop: see `fit`.

    Returns:
      one record an epoch, see `fit`.

    Raises:
      InputError: data, split, checkpoint or workdir are not fit for it, and nothing was written; or see `fit`.
      StoppedError: see `fit`.
    """
    task = TASKS[config.task]
    check_output_dir(workdir)
    mesh = make_mesh(devices, config.train.batch_size)
    lung, config = _load_lung(config, task, lung_checkpoint)
    cases = find_cases(data_dir)
    parts = make_split(cases, split)
    train_cases, val_cases = parts.cases("train", cases), parts.cases("val", cases) if parts.val else []
    if task.target == "infection":
        require_infection_masks([*train_cases, *val_cases])
    lung_split = lung_checkpoint / "split.json" if lung_checkpoint else None
    if lung_split and lung_split.is_file() and read_split(lung_split) != parts:
        logger.warning(
            "%s differs from this split: the lung model may have seen this run's validation or test cases", lung_split
        )

    with locked(workdir) if is_primary() else contextlib.nullcontext():
        _check_resumable(workdir, config, parts)
        prepared = prepare_cases([*train_cases, *val_cases], config.preprocess, cache_dir)
        train_set, val_set = prepared[: len(train_cases)], prepared[len(train_cases) :]
        train_source = SliceSource(train_set, task.target)
        val_source = SliceSource(val_set, task.target) if val_set else None
        logger.info("%s: %d training and %d validation slices", config.task, len(train_source), len(val_source or ()))
        if not val_set:
            logger.info("no validation cases: all epochs are trained, and the last is kept")
        wait_for_all("settings checked")
        if is_primary():
            _write_settings(workdir, config, parts)
            _draw_inputs(workdir, config, train_set, train_source, task)
        history = fit(config, train_source, val_source, workdir, lung, mesh=mesh, should_stop=should_stop)
        best = load_model(workdir)
        if is_primary():
            figures.save_loss_curves(workdir / "figures" / "loss_curves.png", history)
            if val_set:
                _use_validation(workdir, best, val_set, lung, task)
        logger.info("done: %s", workdir)
    return history


def versions() -> dict[str, str]:
    """Python, packages, machine and device, to write beside results."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": f"{device.platform} {device.device_kind} × {jax.device_count()}",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # this one, where it runs from a folder that was not installed
        return "not installed"


def _load_lung(config: Config, task: Task, lung_checkpoint: Path | None) -> tuple[LoadedModel | None, Config]:
    if not task.uses_lung:
        return None, config
    if lung_checkpoint is None:
        raise InputError(
            "infection training needs the lung model: give its workdir with --lung_checkpoint, or --ct_only"
        )
    lung = load_model_for(lung_checkpoint, "lung", "--lung_checkpoint")
    if lung.config.preprocess != config.preprocess:
        raise InputError(
            f"{lung_checkpoint}: its slices were prepared by {lung.config.preprocess}, this training asks for "
            f"{config.preprocess}; use the same --recipe, --image_size and --normalization"
        )
    return lung, dataclasses.replace(config, lung_fingerprint=fingerprint(lung.variables))


def _comparable(config: Config) -> dict[str, Any]:
    """What may not change when a run goes on: its length only where the learning rate does not depend on it."""
    values = to_dict(config)
    for name in ("patience", *(["epochs"] if config.train.schedule == "step" else [])):
        del values["train"][name]
    return values


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in new.items():
        if isinstance(value, dict):
            found += _differences(old[name], value, f"{prefix}{name}.")
        elif old[name] != value:
            found.append(f"{prefix}{name} was {old[name]}, is {value}")
    return found


def _check_resumable(workdir: Path, config: Config, split: Split) -> None:
    """Refuses a workdir that holds another run."""
    file = workdir / "config.json"
    if (workdir / CHECKPOINTS).is_dir() and file.is_file():
        try:
            old = from_dict(json.loads(file.read_text(encoding="utf-8")), str(file))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({error}); choose a new --workdir") from error
        differences = _differences(_comparable(old), _comparable(config))
        if differences:
            raise InputError(f"{workdir} holds another run ({'; '.join(differences)}); choose a new --workdir")
        if read_split(workdir / "split.json") != split:
            raise InputError(f"{workdir} holds a run on another split; choose a new --workdir")


def _write_settings(workdir: Path, config: Config, split: Split) -> None:
    make_output_dir(workdir / "figures")
    for name, values in (("config", to_dict(config)), ("versions", versions())):
        write_text(workdir / f"{name}.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    write_split(workdir / "split.json", split)


def _draw_inputs(
    workdir: Path, config: Config, train_set: Sequence[PreparedCase], source: SliceSource, task: Task
) -> None:
    """The steps of the region of interest for a scan of each source, and an augmented batch; once a run."""
    roi_file, batch_file = workdir / "figures" / "roi_steps.png", workdir / "figures" / "augmented_batch.png"
    if roi_file.is_file() and batch_file.is_file():
        return
    by_source = {prepared.case.source: prepared.case for prepared in reversed(train_set)}
    volumes = {case.id: read_volume(case.ct) for case in by_source.values()}
    figures.save_roi_steps(roi_file, volumes, config.preprocess)
    picks = np.random.default_rng(config.train.seed).permutation(len(source))[:8]
    slices = [source[int(i)] for i in picks]
    image, mask = jax.jit(augment, static_argnames="config")(
        jax.random.key(config.train.seed),
        np.stack([s["image"] for s in slices]),
        np.stack([s["mask"] for s in slices]).astype(np.float32),
        config=config.augment,
    )
    figures.save_batch(batch_file, np.asarray(image), np.asarray(mask), task.target)


def _use_validation(
    workdir: Path, best: LoadedModel, val_set: Sequence[PreparedCase], lung: LoadedModel | None, task: Task
) -> None:
    """Chooses the best model's threshold, and draws it on the validation slices with most of the target."""
    predict = _make_predict(best, lung)
    volumes: list[tuple[FloatArray, Array]] = []
    overlays: list[figures.Overlay] = []
    for prepared in val_set:
        targets = getattr(prepared, task.target)
        probabilities = np.stack([predict(image) for image in prepared.images])
        volumes.append((probabilities, targets))
        areas = targets.sum(axis=(1, 2))
        for k in sorted({int(np.argmax(areas)), len(areas) // 2}) if len(overlays) < _MAX_OVERLAYS else ():
            masks = {str(task.target): targets[k]}, {str(task.target): probabilities[k] > 0.5}
            overlays.append(figures.Overlay(f"{prepared.case.id} slice {k}", prepared.images[k], *masks))
    figures.save_overlays(workdir / "figures" / "validation_samples.png", overlays)
    if chosen := choose_threshold(volumes):
        save_threshold(workdir, *chosen, [prepared.case.id for prepared in val_set])


def _make_predict(best: LoadedModel, lung: LoadedModel | None) -> Callable[[FloatArray], FloatArray]:
    """A function from a prepared slice (S, S) to its probability (S, S)."""

    def probability(loaded: LoadedModel, x: jax.Array) -> jax.Array:
        return predict_probability(loaded.model, loaded.variables, x, patch_factor=loaded.config.train.patch_factor)

    @jax.jit
    def predict(image: jax.Array) -> jax.Array:
        x = image[None, :, :, None]
        stacked = infection_input(best.model, x, probability(lung, x) if lung else None)
        return probability(best, stacked)[0, ..., 0]

    return lambda image: np.asarray(predict(image))
