"""Batches and preprocessed cache compared with opening, scaling, cropping and resizing each slice each time."""

import contextlib
import dataclasses
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np
import numpy.typing as npt

from benchmarks.measure import Row, in_subprocess, interleave, row
from benchmarks.training import BATCH, NARROW, Setting, config_of
from resunet_jax.config import PreprocessConfig
from resunet_jax.data.batches import SliceSource, train_batches
from resunet_jax.data.cases import Case, find_cases
from resunet_jax.data.phantom import PhantomConfig, make_phantom
from resunet_jax.data.preprocess import prepare_mask, prepare_volume
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.data.volume import Grid, Volume
from resunet_jax.training.devices import make_mesh, process_shard
from resunet_jax.training.loop import fit

_CONFIG = PreprocessConfig(normalization="window")  # which needs one slice alone, as the per-slice way has it
_SLICES = 64  # of a scan
_BATCHES = 400  # that the cache is timed on
_OPENED = 32  # slices that the per-slice way is timed on


def data_suite(rounds: int) -> list[Row]:
    """Slices per second, and what training waits for."""
    with tempfile.TemporaryDirectory(prefix="resunet-jax-benchmark-") as name:
        root = Path(name)
        make_phantom(root / "set", PhantomConfig(volumes=4, slices=_SLICES))
        cases = find_cases(root / "set")
        return [
            _batches(root, cases, rounds),
            _building(root, cases, rounds, zipped=False),
            _building(root, _zipped(root, cases), rounds, zipped=True),
            _cores(root, cases, rounds),
            _waiting(root, cases),
            *(_building_memory(root, volumes) for volumes in (2, len(cases))),
        ]


def open_slice(case: Case, k: int) -> dict[str, npt.NDArray[Any]]:
    """The per-slice way: slice k of a case and its masks, by opening the files for it alone."""
    ct: Any = nib.load(case.ct)
    grid = Grid(ct.shape, ct.affine, ct.header)
    axis, first, stop = grid.file_slices(k, k + 1)
    index = (slice(None),) * axis + (slice(first, stop),)
    values = grid.to_pls(np.asarray(ct.dataobj[index]))
    images, boxes = prepare_volume(Volume(values, "hu" if case.source == "coronacases" else "windowed", grid), _CONFIG)
    arrays: dict[str, npt.NDArray[Any]] = {"image": images}
    for name, path in (("lung", case.lung_mask), ("infection", case.infection_mask)):
        if path is not None:
            mask: Any = nib.load(path)
            arrays[name] = prepare_mask(grid.to_pls(np.asarray(mask.dataobj[index])), boxes, _CONFIG.image_size)
    return arrays


def _open_slices(cases: Sequence[Case]) -> None:
    for i in range(_OPENED):
        open_slice(cases[i % len(cases)], i * _SLICES // _OPENED // 2)


def _batches(root: Path, cases: Sequence[Case], rounds: int) -> Row:
    source = SliceSource(prepare_cases(cases, _CONFIG, root / "cache"), "lung")
    batches = train_batches(source, BATCH, 0, process_shard(make_mesh(1, BATCH)))

    def from_cache() -> None:
        for _ in range(_BATCHES):
            batch = next(batches)
        jax.block_until_ready(batch)

    seconds = interleave(from_cache, lambda: _open_slices(cases), rounds, settle=False)
    batches.close()
    name = f"batches, {_CONFIG.image_size}², batch {BATCH}, compared with opening each slice (.nii)"
    return row("data", name, "slices/s", *_rates(seconds, _BATCHES * BATCH), min_value=3000, min_ratio=50)


def _building(root: Path, cases: Sequence[Case], rounds: int, *, zipped: bool) -> Row:
    with _cores_used(1):
        seconds = interleave(_build(root, cases), lambda: _open_slices(cases), rounds, settle=False)
    suffix = ".nii.gz" if zipped else ".nii"
    name = f"building the preprocessed cache, one core, compared with opening each slice ({suffix})"
    return row("data", name, "slices/s", *_rates(seconds, _slices(cases)), min_ratio=5 if zipped else 2)


def _cores(root: Path, cases: Sequence[Case], rounds: int) -> Row:
    build = _build(root, cases)

    def one_core() -> None:
        with _cores_used(1):
            build()

    seconds = interleave(build, one_core, rounds, settle=False)
    rates = [[_slices(cases) / s for s in side] for side in seconds]
    name = f"building the preprocessed cache, {os.cpu_count()} cores compared with one (.nii)"
    return row("data", name, "slices/s", *rates)


def _build(root: Path, cases: Sequence[Case]) -> Any:
    def build() -> None:
        shutil.rmtree(root / "fresh", ignore_errors=True)
        prepare_cases(cases, _CONFIG, root / "fresh")

    return build


def _building_memory(root: Path, volumes: int) -> Row:
    """The most memory that a process holds which prepares some volumes."""
    code = (
        "from pathlib import Path\n"
        "from resunet_jax.config import PreprocessConfig\n"
        "from resunet_jax.data.cases import find_cases\n"
        "from resunet_jax.data.slice_cache import prepare_cases\n"
        f"cases = find_cases(Path({str(root / 'set')!r}))[:{volumes}]\n"
        f"prepare_cases(cases, {_CONFIG!r}, Path({str(root / f'memory_{volumes}')!r}))\n"
    )
    _, _, peak = in_subprocess(code)
    return row("data", f"building the preprocessed cache, {volumes} volumes: peak", "GB", [peak])


def _rates(seconds: tuple[list[float], list[float]], slices: int) -> list[list[float]]:
    return [[count / s for s in side] for side, count in zip(seconds, (slices, _OPENED), strict=True)]


def _slices(cases: Sequence[Case]) -> int:
    return sum(int(nib.load(case.ct).shape[2]) for case in cases)


def _waiting(root: Path, cases: Sequence[Case]) -> Row:
    """The fraction of a real training's step time that the host waits for data, as in metrics.jsonl."""
    config = config_of(Setting(NARROW, _CONFIG.image_size, "float32"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2))
    source = SliceSource(prepare_cases(cases[:2], _CONFIG, root / "cache"), "lung")
    _, record = fit(config, source, None, root / "run")  # the first epoch compiles
    waited = 100 * record["data_wait_seconds"] / record["seconds"]
    return row(
        "data", f"waiting for data in training, {'-'.join(map(str, NARROW))}", "% of the step", [waited], max_value=2
    )


def _zipped(root: Path, cases: Sequence[Case]) -> list[Case]:
    """The same cases as .nii.gz."""

    def zipped(path: Path) -> Path:
        target = root / "zipped" / path.parent.name / f"{path.name}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as plain, gzip.open(target, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(plain, packed)
        return target

    return [
        dataclasses.replace(
            case,
            ct=zipped(case.ct),
            lung_mask=zipped(case.lung_mask),
            infection_mask=zipped(case.infection_mask) if case.infection_mask else None,
        )
        for case in cases
    ]


@contextlib.contextmanager
def _cores_used(number: int) -> Iterator[None]:
    """Confines this process to some cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)
