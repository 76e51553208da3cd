"""The preprocessed cache: each volume read once; cropped, resized slices memory-mapped from disk.

A scan's slices lie in a folder of their own whose name is a digest of everything that made them: the content of its
files, the settings, what their values are assumed to be, and the version of this module. The folder is written
atomically. The cache has a bound: the scans that were used longest ago are removed first, never one in use.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import Case
from resunet_jax.data.preprocess import context_slices, prepare_mask, prepare_volume
from resunet_jax.data.readers import READERS, Reader, digest, read_mask, read_volume
from resunet_jax.data.volume import HU_WINDOW, FloatArray
from resunet_jax.errors import InputError
from resunet_jax.files import atomic_dir, make_output_dir, remove_dir, write_text
from resunet_jax.progress import logger, parallel_map

_FORMAT = 6  # raise it when the same files and settings would give other slices
_ASSUMED_FORMAT = 2  # the same for body thresholds on the range of slices whose window is assumed
_MAX_WORKERS = 4  # each holds a volume in memory
_MAX_NAME_BYTES = 120  # of a case id in the name of a folder, which may have 255 and gets a longer one while it is made
_IN_USE = ".in_use"  # folder of the cache: for each `prepare_cases` whose result is alive, a lock and the names

MAX_CACHE_GB = 20.0
"""How much a cache holds by default; the full Kaggle set takes 0.35 GB at 128 × 128 pixels, 5.5 GB at 512 × 512."""


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """The slices of one scan, as a model sees them.

    Attributes:
      case: where they come from.
      digest: of the content of its files, the settings, and what its values were assumed to be.
      images: float32 (slices, S, S, C) in [0, 1], see `prepare_volume`.
      boxes: int32 (slices, 4): row, column, height, width of each crop in its slice, in pixels.
      lung: uint8 (slices, S, S, 1), 1 in either lung.
      infection: uint8 (slices, S, S, C), of each channel of the images; None where the case has no infection mask.
      assumed: what its values were taken to be, see `open_scan`; None where that was inferred.
      lease: as long as it lives, the arrays stay in the cache.
    """

    case: Case
    digest: str
    images: FloatArray
    boxes: npt.NDArray[np.int32]
    lung: npt.NDArray[np.uint8]
    infection: npt.NDArray[np.uint8] | None
    assumed: tuple[float, float] | None = None
    lease: FileLock | None = dataclasses.field(default=None, repr=False, compare=False)


def prepare_cases(
    cases: Sequence[Case],
    config: PreprocessConfig,
    cache_dir: Path,
    readers: Mapping[str, Reader] = READERS,
    *,
    assumed: tuple[float, float] | None = None,
    max_cache_gb: float = MAX_CACHE_GB,
) -> list[PreparedCase]:
    """Opens the slices of each case, preparing first what is not in the cache, and removes what is beyond its bound.

    Args:
      cases: the scans.
      config: how to prepare them.
      cache_dir: created where it is missing. It may be deleted at any time between runs.
      readers: the table of formats.
      assumed: see `open_scan`; slices made by another assumption are not taken.
      max_cache_gb: the bound. These cases stay, and what others use, even beyond it.

    Raises:
      InputError: a scan or mask is bad, or the cache cannot be written.
    """
    make_output_dir(cache_dir, "cache_dir")
    names = parallel_map("hashing scans", lambda case: _digest(case, config, readers, assumed), cases, _MAX_WORKERS)
    folders = [cache_dir / name for name in names]
    lease = _lease(cache_dir, names)
    missing = [(case, folder) for case, folder in zip(cases, folders, strict=True) if not folder.is_dir()]
    parallel_map("preparing scans", lambda pair: _build(*pair, config, readers, assumed), missing, _MAX_WORKERS)
    prepared = [_open(case, folder, assumed, lease) for case, folder in zip(cases, folders, strict=True)]
    if lease:
        _prune(cache_dir, max_cache_gb)
    return prepared


def content_digests(
    cases: Sequence[Case], readers: Mapping[str, Reader] = READERS, *, assumed: tuple[float, float] | None = None
) -> dict[str, str]:
    """By case, a digest of the content of its files and of what their values are assumed to be.

    Raises:
      InputError: a file cannot be read.
    """
    digests = parallel_map("hashing scans", lambda case: _short_digest([assumed], case, readers), cases, _MAX_WORKERS)
    return dict(zip((case.id for case in cases), digests, strict=True))


def _digest(
    case: Case, config: PreprocessConfig, readers: Mapping[str, Reader], assumed: tuple[float, float] | None
) -> str:
    settings = [_FORMAT, dataclasses.asdict(config), *([] if assumed is None else [assumed])]
    if assumed not in (None, HU_WINDOW) and config.body_thresholds_minmax:
        settings.append(_ASSUMED_FORMAT)
    name = case.id.encode(errors="surrogateescape")[:_MAX_NAME_BYTES].decode(errors="ignore")
    return f"{name}-{_short_digest(settings, case, readers)}"


def _short_digest(settings: Sequence[Any], case: Case, readers: Mapping[str, Reader]) -> str:
    files = (case.ct, case.lung_mask, case.infection_mask)
    key = [json.dumps(settings), *("none" if path is None else digest(path, readers) for path in files)]
    return hashlib.sha256(" ".join(key).encode()).hexdigest()[:24]


def _build(
    case: Case,
    folder: Path,
    config: PreprocessConfig,
    readers: Mapping[str, Reader],
    assumed: tuple[float, float] | None,
) -> None:
    volume = read_volume(case.ct, readers, assumed=assumed, physical=config.is_physical)
    masks = {"lung": case.lung_mask, "infection": case.infection_mask}
    # Masks are read before the slow part, so that a bad one is reported at once.
    labels = {name: read_mask(path, case.ct, volume.grid, readers) for name, path in masks.items() if path is not None}
    images, boxes = prepare_volume(volume, config)
    with atomic_dir(folder, "cache_dir") as partial:
        np.save(partial / "images.npy", images)
        np.save(partial / "boxes.npy", boxes)
        for name, label in labels.items():
            step = context_slices(config, volume.grid) if name == "infection" else 0
            np.save(partial / f"{name}.npy", prepare_mask(label, boxes, config.image_size, step))


def _open(case: Case, folder: Path, assumed: tuple[float, float] | None, lease: FileLock | None) -> PreparedCase:
    try:
        images, boxes, lung = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "boxes", "lung"))
        infection = np.load(folder / "infection.npy", mmap_mode="r") if case.infection_mask else None
        masks = [lung] if infection is None else [lung, infection]
        expected = {np.float32: [images], np.int32: [boxes], np.uint8: masks}
        if any(a.dtype != dtype for dtype, some in expected.items() for a in some) or images.ndim != 4:
            raise ValueError("arrays of another type")
        shapes = [(*images.shape[:3], 1), images.shape][: len(masks)]
        if boxes.shape != (len(images), 4) or [mask.shape for mask in masks] != shapes:
            raise ValueError("arrays of other shapes")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder}: damaged ({error}); delete this folder, it will be made again") from error
    return PreparedCase(case, folder.name, images, boxes, lung, infection, assumed, lease)


def _lease(cache_dir: Path, names: Sequence[str]) -> FileLock | None:
    """Keeps scans from being removed as long as the result lives; None where we may only read the cache."""
    file = cache_dir / _IN_USE / uuid.uuid4().hex
    lease = FileLock(file.with_suffix(".lock"), thread_local=False)  # any thread may be the last that uses it
    try:
        with _prune_lock(cache_dir):
            lease.acquire()
            write_text(file, "\n".join(names))
    except (OSError, InputError):
        return None
    for folder in (cache_dir / name for name in names):
        with contextlib.suppress(OSError):  # not made yet, or another user's
            os.utime(folder)  # it is used now
    return lease


def _prune_lock(cache_dir: Path) -> FileLock:
    return FileLock(cache_dir / _IN_USE / "prune.lock")


def _names_in_use(cache_dir: Path) -> Iterator[str]:
    """Of scans that some process uses; what ended processes have left is removed."""
    for file in [path for path in (cache_dir / _IN_USE).iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]:
        lock = file.with_suffix(".lock")
        try:
            with FileLock(lock, timeout=0):
                file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        except (Timeout, OSError):
            yield from file.read_text(encoding="utf-8").split("\n")


def _prune(cache_dir: Path, max_gb: float) -> None:
    """Removes scans until the cache is within its bound: those used longest ago first, none that is in use."""
    removed = 0
    with contextlib.suppress(OSError), _prune_lock(cache_dir):  # somebody deletes the cache, or makes it read-only
        in_use = set(_names_in_use(cache_dir))
        scans = [path for path in cache_dir.iterdir() if re.fullmatch(r"[^.].*-[0-9a-f]{24}", path.name)]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in scans}
        excess = sum(sizes.values()) - max_gb * 1e9
        for path in sorted(scans, key=lambda path: path.stat().st_mtime):
            if excess > 0 and path.name not in in_use and remove_dir(path):
                removed, excess = removed + 1, excess - sizes[path]
    if removed:
        logger.info(
            "%s: removed the slices of %d scans, used longest ago; the cache holds at most %g GB, see `max_cache_gb`",
            cache_dir,
            removed,
            max_gb,
        )
