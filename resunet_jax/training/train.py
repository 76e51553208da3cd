"""One training run from data folder to workdir: a folder that explains itself."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resunet_jax import __version__, plots
from resunet_jax.config import UNKNOWN_PATIENTS, Config, differences, from_dict, to_dict
from resunet_jax.data.batches import SliceSource
from resunet_jax.data.cases import Case, find_cases, require_infection_masks
from resunet_jax.data.readers import READERS, Reader, read_grid, read_mask, read_volume
from resunet_jax.data.slice_cache import MAX_CACHE_GB, PreparedCase, prepare_cases
from resunet_jax.data.splits import DEFAULT_SPLIT, Split, SplitRequest, make_split, read_split, write_split
from resunet_jax.data.volume import Array, Grid
from resunet_jax.errors import InputError
from resunet_jax.files import check_output_dir, dir_lock, expand_user, make_output_dir, read_json, write_json
from resunet_jax.inference.predictor import Predictor, choose_threshold
from resunet_jax.model.build import ARCHITECTURES, TASKS, Architecture, Task, build_model, model_image_size
from resunet_jax.progress import logger
from resunet_jax.training.augment import AUGMENTATIONS, Augmentation, augment, check_transforms
from resunet_jax.training.devices import barrier, is_primary, make_mesh
from resunet_jax.training.loop import epochs_done, fit, ignore_epoch, never_stop
from resunet_jax.training.losses import LOSSES, Loss, make_loss
from resunet_jax.training.step import can_transfer
from resunet_jax.weights.store import (
    CHECKPOINTS,
    CONFIG_FILE,
    DIGESTS_FILE,
    History,
    LoadedModel,
    checkpoint_steps,
    fingerprint,
    load_model,
    load_model_for,
    save_threshold,
    variable_shapes,
)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "nibabel", "scipy")
_MAX_OVERLAYS = 6
_DATA_FILE = "data.json"  # digests of the cases
# When a run resumes; the split tells the patients. The number of epochs may where the learning rate is not set by it.
_MAY_CHANGE = ("train.patience", "train_patients", "val_patients")


def train(
    config: Config,
    data_dir: str | Path,
    workdir: str | Path,
    cache_dir: str | Path,
    *,
    split: SplitRequest = DEFAULT_SPLIT,
    lung_checkpoint: str | Path | None = None,
    initial_checkpoint: str | Path | None = None,
    devices: int | None = 1,
    should_stop: Callable[[int], bool] = never_stop,
    on_epoch: Callable[[dict[str, Any]], None] = ignore_epoch,
    losses: Mapping[str, Loss] = LOSSES,
    augmentations: Mapping[str, Augmentation] = AUGMENTATIONS,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
    readers: Mapping[str, Reader] = READERS,
    assumed: tuple[float, float] | None = None,
    max_cache_gb: float = MAX_CACHE_GB,
) -> History:
    """Trains a model, or resumes from the workdir's latest checkpoint.

    Args:
      config: what to train and how; the fingerprints and the patients are filled in here.
      data_dir: see `find_cases`.
      workdir: gets config.json, split.json, data.json, versions.json, metrics.jsonl, checkpoints/, figures/ and, where
        there are validation cases, threshold.json.
      cache_dir: see `prepare_cases`.
      split: see `make_split`; without validation cases all epochs are trained and the last is kept.
      lung_checkpoint: for task "infection", the lung model that feeds it.
      initial_checkpoint: a trained model of the same structure to begin with (fine-tuning), for `load_model`; its
        patients count as this model's too.
      devices: how many share a batch, None for all; see `make_mesh`.
      should_stop: see `fit`.
      on_epoch: see `fit`.
      losses: the table of loss terms.
      augmentations: the table of transforms.
      architectures: the table of models.
      readers: the table of formats.
      assumed: what the scans' values are, see `open_scan`; by default inferred for each.
      max_cache_gb: see `prepare_cases`.

    Returns:
      one record per epoch, see `fit`.

    Raises:
      InputError: data, split, checkpoint or workdir are not fit for it, and nothing was trained; or see `fit`.
      StoppedError: see `fit`.
    """
    data_dir, workdir, cache_dir = (expand_user(path) for path in (data_dir, workdir, cache_dir))
    lung_checkpoint = None if lung_checkpoint is None else expand_user(lung_checkpoint)
    initial_checkpoint = None if initial_checkpoint is None else expand_user(initial_checkpoint)
    task = TASKS[config.task]
    check_settings(config, losses, augmentations, architectures)
    check_output_dir(workdir)
    mesh = make_mesh(devices, config.train.batch_size)
    lung = _load_lung(config, task, lung_checkpoint, architectures)
    initial = load_initial(config, initial_checkpoint, architectures) if initial_checkpoint else None
    chosen, train_cases, val_cases, held_out = _split_cases(data_dir, split, task, readers)
    if lung_checkpoint and lung:
        _warn_of_lung_split(lung_checkpoint, lung, chosen, held_out)
    if initial_checkpoint and initial:
        _warn_of_seen(initial_checkpoint, initial, chosen, held_out)
    begun_with = initial or _lung_to_begin_with(config, lung, lung_checkpoint, architectures)
    config = _filled_in(config, lung, initial, begun_with, train_cases, val_cases)
    with dir_lock(workdir) if is_primary() else contextlib.nullcontext():
        is_begun = _check_resumable(workdir, config, chosen)
        prepared = prepare_cases(
            [*train_cases, *val_cases],
            config.preprocess,
            cache_dir,
            readers,
            assumed=assumed,
            max_cache_gb=max_cache_gb,
        )
        digests = {one.case.id: one.digest for one in prepared}
        if is_begun:
            check_data_unchanged(workdir, digests)
        train_set, val_set = prepared[: len(train_cases)], prepared[len(train_cases) :]
        train_slices, val_slices = _slice_sources(config, train_set, val_set)
        barrier("settings checked")
        if is_primary():
            _write_settings(workdir, config, chosen)
            write_data_record(workdir, digests, anew=not is_begun)
            _plot_inputs(workdir, config, train_set, train_slices, task, augmentations, readers)
        history = fit(
            config,
            train_slices,
            val_slices,
            workdir,
            lung,
            initial=initial,
            mesh=mesh,
            should_stop=should_stop,
            on_epoch=on_epoch,
            losses=losses,
            augmentations=augmentations,
            architectures=architectures,
        )
        best = load_model(workdir, architectures)
        if is_primary():
            plots.save_loss_curves(workdir / "figures" / "loss_curves.png", history)
            if val_set:
                models = (best, None) if task.target == "lung" else (lung, best)
                _use_validation(workdir, Predictor(*models), val_set, task, readers)
        logger.info("done: %s", workdir)
    return history


def _slice_sources(
    config: Config, train_set: Sequence[PreparedCase], val_set: Sequence[PreparedCase]
) -> tuple[SliceSource, SliceSource | None]:
    """The training and the validation slices; None where no case validates."""
    target = TASKS[config.task].target
    train_slices = SliceSource(train_set, target)
    val_slices = SliceSource(val_set, target) if val_set else None
    logger.info("%s: %d training and %d validation slices", config.task, len(train_slices), len(val_slices or ()))
    if val_slices is None:
        logger.info("no validation cases: all epochs are trained, and the last is kept")
    return train_slices, val_slices


def check_settings(
    config: Config,
    losses: Mapping[str, Loss],
    augmentations: Mapping[str, Augmentation],
    architectures: Mapping[str, Architecture],
) -> None:
    """Refuses what the tables lack, and augmentation that the normalization does not allow.

    Raises:
      InputError: says which.
    """
    make_loss(config.train.loss, losses)
    check_transforms(config.augment, augmentations)
    build_model(config, architectures=architectures)
    if not config.preprocess.is_physical and config.augment.lesion_densify_prob + config.augment.lesion_fade_prob > 0:
        raise InputError(
            "lesion_densify_prob and lesion_fade_prob change intensities in HU, which normalization minmax does not "
            "keep; set both to 0, or choose another normalization"
        )


def _patients(cases: Sequence[Case]) -> tuple[str, ...]:
    return tuple(sorted({case.patient for case in cases}))


def versions() -> dict[str, str]:
    """Python, packages, machine and device, to write next to results."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "resunet-jax": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": f"{device.platform} {device.device_kind} × {jax.device_count()}",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _load_lung(
    config: Config, task: Task, lung_checkpoint: Path | None, architectures: Mapping[str, Architecture]
) -> LoadedModel | None:
    if not task.uses_lung:
        return None
    if lung_checkpoint is None:
        raise InputError(
            "infection training needs the lung model: give its workdir with `lung_checkpoint`, or train on CT alone "
            "(task infection_ct)"
        )
    lung = load_model_for(lung_checkpoint, "lung", architectures)
    if not lung.config.preprocess.can_feed(config.preprocess):
        raise InputError(
            f"{lung_checkpoint}: its slices were prepared by {lung.config.preprocess}, this training asks for "
            f"{config.preprocess}; use the same `recipe`, `image_size` and `normalization`, and no other context_mm"
        )
    return lung


def _lung_to_begin_with(
    config: Config, lung: LoadedModel | None, path: Path | None, architectures: Mapping[str, Architecture]
) -> LoadedModel | None:
    """The lung model, where the training is to begin with its variables and can."""
    if lung is None or not config.cascade.start_from_lung:
        return None
    if _can_begin_with(lung, config, architectures):
        return lung
    logger.info("%s: its filters or architecture are others; the infection model begins at random", path)
    return None


def _can_begin_with(loaded: LoadedModel, config: Config, architectures: Mapping[str, Architecture]) -> bool:
    model = build_model(config, architectures=architectures)
    return can_transfer(loaded.variables, variable_shapes(model, model_image_size(config)))


def load_initial(
    config: Config, initial_checkpoint: str | Path, architectures: Mapping[str, Architecture] = ARCHITECTURES
) -> LoadedModel:
    """A trained model that a training by this config can begin with.

    Raises:
      InputError: there is none, or it is of another structure, architecture, width or preparation of slices.
    """
    initial = load_model_for(initial_checkpoint, TASKS[config.task].target, architectures)
    model = build_model(config, architectures=architectures)
    compared = {
        "architecture": (initial.config.model.architecture, config.model.architecture),
        "filters": (initial.config.model.filters, config.model.filters),
        "input channels": (initial.model.in_channels, model.in_channels),
    }
    theirs, ours = (dataclasses.asdict(one.preprocess) for one in (initial.config, config))
    # A model takes slices of any size.
    compared |= {name: (theirs[name], ours[name]) for name in ours if name != "image_size"}
    differing = [f"{name} {old}, not {new}" for name, (old, new) in compared.items() if old != new]
    if differing or not _can_begin_with(initial, config, architectures):
        what = "; ".join(differing) or "other layers"
        raise InputError(
            f"{initial_checkpoint}: the training cannot begin with it, which has {what}; train with its settings, or "
            "begin with another model"
        )
    return initial


def _filled_in(
    config: Config,
    lung: LoadedModel | None,
    initial: LoadedModel | None,
    begun_with: LoadedModel | None,
    train_cases: Sequence[Case],
    val_cases: Sequence[Case],
) -> Config:
    """The config with the fingerprints of the models that it builds on, and all patients that the model has seen."""
    train_patients, val_patients = set(_patients(train_cases)), set(_patients(val_cases))
    if begun_with:
        train_patients |= set(begun_with.config.train_patients or (UNKNOWN_PATIENTS,))
        val_patients |= set(begun_with.config.val_patients)
    return dataclasses.replace(
        config,
        lung_fingerprint=fingerprint(lung.variables) if lung else config.lung_fingerprint,
        initial_fingerprint=fingerprint(initial.variables) if initial else config.initial_fingerprint,
        train_patients=tuple(sorted(train_patients)),
        val_patients=tuple(sorted(val_patients)),
    )


def _split_cases(
    data_dir: Path, request: SplitRequest, task: Task, readers: Mapping[str, Reader]
) -> tuple[Split, list[Case], list[Case], list[Case]]:
    """The split, its training and its validation cases, and those of patients that do not train."""
    cases = find_cases(data_dir, readers)
    split = make_split(cases, request)
    train_cases, val_cases = split.cases("train", cases), split.cases("val", cases) if split.val else []
    if task.target == "infection":
        require_infection_masks([*train_cases, *val_cases])
    train_patients = _patients(train_cases)
    held_out = [c for c in cases if c.id in (*split.val, *split.test) and c.patient not in train_patients]
    return split, train_cases, val_cases, held_out


def _warn_of_lung_split(lung_checkpoint: Path, lung: LoadedModel, split: Split, held_out: Sequence[Case]) -> None:
    """Warns of a lung model of another split, or that has seen more than this one trains on."""
    split_file = lung_checkpoint / "split.json"
    if split_file.is_file() and not read_split(split_file).has_subsets_of(split):
        logger.warning("%s differs from this split: the lung model may have seen validation or test cases", split_file)
    else:
        _warn_of_seen(lung_checkpoint, lung, split, held_out)


def _warn_of_seen(path: Path, model: LoadedModel, split: Split, held_out: Sequence[Case]) -> None:
    """Warns of a model that was trained on held-out cases, or whose epoch was chosen on test cases."""
    tested = _patients([case for case in held_out if case.id in split.test])
    seen = set(model.config.train_patients) & set(_patients(held_out)) | set(model.config.val_patients) & set(tested)
    if seen:
        logger.warning("%s has seen %s, of this run's validation or test cases", path, ", ".join(sorted(seen)))


def _check_resumable(workdir: Path, config: Config, split: Split) -> bool:
    """Refuses a workdir that holds something else than this run; whether the run is begun."""
    file, split_file = workdir / CONFIG_FILE, workdir / "split.json"
    if (workdir / DIGESTS_FILE).exists():
        raise InputError(f"{workdir}: is a saved model; choose a new `workdir` (to fine-tune it, `initial_checkpoint`)")
    has_checkpoints = (workdir / CHECKPOINTS).is_dir() and (file.is_file() or checkpoint_steps(workdir / CHECKPOINTS))
    if not (has_checkpoints or file.exists()):
        return False
    values = read_json(file, "choose a new `workdir`")
    old = from_dict(values, str(file))
    if not has_checkpoints:  # ended before the first one
        return False
    if "version" not in values:
        raise InputError(
            f"{workdir}: was begun by resunet_jax 0.6.0 or older, which draws other random numbers; finish "
            "it with that version, or choose a new `workdir` (its model can be used as it is)"
        )
    changed = [
        f"{path} was {_or_none(was)}, is {_or_none(now)}"
        for path, (was, now) in differences(old, config).items()
        if path not in _MAY_CHANGE and (path != "train.epochs" or config.train.schedule != "step")
    ]
    if changed:
        raise InputError(f"{workdir} holds another run ({'; '.join(changed)}); choose a new `workdir`")
    if not split_file.is_file():
        raise InputError(f"{split_file}: is missing, so that the run cannot be resumed; choose a new `workdir`")
    if read_split(split_file) != split:
        raise InputError(f"{workdir} holds a run on another split; choose a new `workdir`")
    if config.train.epochs < (done := epochs_done(workdir)):
        raise InputError(
            f"{workdir}: {done} epochs are done, `epochs` is {config.train.epochs}; choose a new `workdir`"
        )
    return True


def _or_none(value: Any) -> Any:
    return "none" if value == "" else value


def check_data_unchanged(workdir: Path, digests: Mapping[str, str]) -> None:
    """Refuses to resume a run or study over a scan or mask that has changed since it began.

    `digests` are by case, of all that its slices come from, and of a study the patients. What `write_data_record` has
    not written is new, and not compared.

    Raises:
      InputError: one has changed, or the record cannot be read.
    """
    before = _read_data_record(workdir)
    changed = [case_id for case_id, digest in digests.items() if before.get(case_id, digest) != digest]
    if changed:
        raise InputError(
            f"{workdir}: a scan, mask or patient of {', '.join(changed)} has changed since this run began, or "
            "`assumed` has, or an older version prepared it otherwise; restore it, or choose a new `workdir`"
        )


def write_data_record(workdir: Path, digests: Mapping[str, str], *, anew: bool = False) -> None:
    """Adds digests to data.json, for `check_data_unchanged`, as a study may get further cases; or begins it anew."""
    before = {} if anew else _read_data_record(workdir)
    write_json(workdir / _DATA_FILE, {**before, **digests})


def _read_data_record(workdir: Path) -> dict[str, str]:
    file = workdir / _DATA_FILE
    return read_json(file, "choose a new `workdir`") if file.is_file() else {}


def _write_settings(workdir: Path, config: Config, split: Split) -> None:
    make_output_dir(workdir / "figures")
    write_json(workdir / CONFIG_FILE, to_dict(config))
    write_json(workdir / "versions.json", versions())
    write_split(workdir / "split.json", split)


def _plot_inputs(
    workdir: Path,
    config: Config,
    train_set: Sequence[PreparedCase],
    source: SliceSource,
    task: Task,
    augmentations: Mapping[str, Augmentation],
    readers: Mapping[str, Reader],
) -> None:
    """The steps of the region of interest for a scan of each source, and an augmented batch; once a run."""
    roi_file, batch_file = workdir / "figures" / "roi_steps.png", workdir / "figures" / "augmented_batch.png"
    if roi_file.is_file() and batch_file.is_file():
        return
    by_source = {prepared.case.source: prepared for prepared in reversed(train_set)}
    volumes = {
        one.case.id: read_volume(one.case.ct, readers, assumed=one.assumed, physical=config.preprocess.is_physical)
        for one in by_source.values()
    }
    plots.save_roi_steps(roi_file, volumes, config.preprocess)
    picks = np.random.default_rng(config.train.seed).permutation(len(source))[:8]
    batch = source.batch(picks, len(picks))
    image, mask = jax.jit(functools.partial(augment, config=config.augment, augmentations=augmentations))(
        jax.random.key(config.train.seed), batch["image"], batch["mask"].astype(np.float32)
    )
    plots.save_batch(batch_file, np.asarray(image), np.asarray(mask), task.target)


def _use_validation(
    workdir: Path, predictor: Predictor, val_set: Sequence[PreparedCase], task: Task, readers: Mapping[str, Reader]
) -> None:
    """Chooses the best model's threshold; plots the slice with most of the target and the middle one of some cases."""
    references: list[tuple[PreparedCase, Array, Grid]] = []
    overlays: list[plots.Overlay] = []
    for prepared in val_set:
        case = prepared.case
        path = case.lung_mask if task.target == "lung" else case.infection_mask
        if path is None:  # `require_infection_masks` has refused it
            continue
        grid = read_grid(case.ct, readers)
        references.append((prepared, read_mask(path, case.ct, grid, readers) > 0, grid))
        if len(overlays) >= _MAX_OVERLAYS:
            continue
        targets = getattr(prepared, task.target)[..., 0]
        areas = targets.sum(axis=(1, 2))
        probabilities = predictor.scan_probabilities(prepared.images, prepared.boxes, grid)[task.target]
        for k in sorted({int(np.argmax(areas)), len(areas) // 2}):
            masks = (
                {str(task.target): targets[k]},
                {str(task.target): probabilities[k] > predictor.threshold(task.target)},
            )
            overlays.append(plots.Overlay(f"{case.id} slice {k}", prepared.images[k, ..., 0], *masks))
    plots.save_overlays(workdir / "figures" / "validation_samples.png", overlays)
    if chosen := choose_threshold(predictor, task.target, references):
        save_threshold(workdir, *chosen, [one.case.id for one, reference, _ in references if reference.any()])
