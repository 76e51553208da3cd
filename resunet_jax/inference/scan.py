"""One scan: from its file to masks on its own grid, a chunk of slices in memory at a time."""

import contextlib
import ctypes
import dataclasses
import functools
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.preprocess import air_offset, context_slices, prepare_volume
from resunet_jax.data.readers import READERS, Reader, Source, find_sources, open_scan
from resunet_jax.data.readers.disk import temporary_file
from resunet_jax.data.readers.nifti import slice_writer
from resunet_jax.data.roi import body_columns
from resunet_jax.data.volume import FloatArray, Scan
from resunet_jax.errors import InputError
from resunet_jax.files import atomic_file, expand_user, make_output_dir
from resunet_jax.inference.predictor import NativeSlices, Predictor
from resunet_jax.inference.uncertainty import CHUNK_SLICES, MEMBERS, ScanUncertainty, compare_members, uncertainty_map
from resunet_jax.progress import logger, progress

UNCERTAINTY = "_uncertainty.nii.gz"
"""What the file of an uncertainty map is called, after the scan's name."""

NATIVE_CHUNK_SLICES = 8
"""How many slices of the scan's own grid, with many more voxels than the models', are in memory at a time."""

_T = TypeVar("_T")
Mask = npt.NDArray[np.bool_]


def segment_scan(
    scan: str | Path,
    output_dir: str | Path,
    predictor: Predictor,
    *,
    save_probabilities: bool = False,
    uncertainty: bool = False,
    readers: Mapping[str, Reader] = READERS,
    assumed: tuple[float, float] | None = None,
) -> list[Path]:
    """Segments one scan and writes its masks: uint8, 0 or 1, with the scan's own shape, affine and codes.

    Slices are read and written a chunk at a time, the next while the models work; the probabilities meanwhile lie in a
    temporary file.

    Args:
      scan: a path that holds one scan.
      output_dir: gets the files of `mask_paths`; created where it is missing.
      predictor: the models.
      save_probabilities: also writes the probabilities, float32 in [0, 1]: that of the infection calibrated, see
        `Predictor.reported_probability`.
      uncertainty: also compares members, see `compare_members`, and writes the entropy of the members' mean
        probability of infection, calibrated likewise, as <scan>_uncertainty.nii.gz, uint8, 0 certain to 100 (one bit);
        in added lesions, which members do not have, that of the scan's own probability.
      readers: the table of formats.
      assumed: see `open_scan`.

    Returns:
      the files written.

    Raises:
      InputError: the scan is bad, or the folder cannot be written.
    """
    source, *others = find_sources(scan, readers)
    if others:
        raise InputError(f"{scan}: {1 + len(others)} scans in it, where one is expected; use `segment_scans`")
    with open_scan(source, readers, assumed=assumed, physical=predictor.preprocess.is_physical) as opened:
        for warning in opened.warnings:
            logger.warning("%s: %s", source.name, warning)
        paths = mask_paths(source, expand_user(output_dir), predictor, save_probabilities, uncertainty)
        segment_opened(opened, predictor, source.name, paths, uncertainty=uncertainty)
        return paths


def mask_paths(
    scan: Source, output_dir: Path, predictor: Predictor, save_probabilities: bool, uncertainty: bool = False
) -> list[Path]:
    """`<scan>_lung.nii.gz` and so on, `<scan>_lung_probability.nii.gz` and so on, `<scan>_uncertainty.nii.gz`."""
    kinds = ("", "_probability") if save_probabilities else ("",)
    names = [f"{scan.name}_{name}{kind}.nii.gz" for name in predictor.structures for kind in kinds]
    return [output_dir / name for name in (*names, *[f"{scan.name}{UNCERTAINTY}"] * uncertainty)]


def iter_chunks(
    scan: Scan, preprocess: PreprocessConfig, offset: float
) -> Iterator[tuple[int, FloatArray, npt.NDArray[np.int32]]]:
    """Of an open scan, a chunk in memory at a time: its first slice, images and boxes; see `prepare_volume`."""
    slices, around = scan.grid.oriented_shape[-1], context_slices(preprocess, scan.grid)
    for start in range(0, slices, CHUNK_SLICES):
        stop = min(start + CHUNK_SLICES, slices)
        first, last = max(start - around, 0), min(stop + around, slices)
        volume = scan.read_slices(first, last)
        yield start, *prepare_volume(volume, preprocess, offset, start - first, stop - first)


def prefetch(items: Iterator[_T], dispose: Callable[[_T], object] = lambda item: None) -> Generator[_T]:
    """The same items; each is made, in another thread, while the one before is used. Close it when done.

    Args:
      items: the iterator.
      dispose: called for an item that was made and is not going to be used.
    """
    executor = ThreadPoolExecutor(1)
    coming = executor.submit(next, items, None)
    try:
        while (item := coming.result()) is not None:
            coming = executor.submit(next, items, None)
            yield item
    finally:
        coming.add_done_callback(functools.partial(_dispose, dispose))
        executor.shutdown(wait=False, cancel_futures=True)  # waiting would block the garbage collector


def _dispose(dispose: Callable[[Any], object], future: "Future[Any]") -> None:
    if not future.cancelled() and future.exception() is None and future.result() is not None:
        dispose(future.result())


@dataclasses.dataclass(frozen=True)
class SegmentedScan:
    """An open scan and its masks, on its own grid.

    Attributes:
      scan: the scan; it must be open as long as slices are read.
      predictor: the models.
      packed: by structure, for each slice its mask (rows, columns), packed to bits.
      profiles: by structure, voxels of the mask in each column.
      boxes: int32 (slices, 4), see `prepare_volume`.
      offset: see `air_offset`.
      uncertainty: what members say, where it was asked for.
    """

    scan: Scan
    predictor: Predictor
    packed: Mapping[str, list[npt.NDArray[np.uint8]]]
    profiles: Mapping[str, npt.NDArray[np.int64]]
    boxes: npt.NDArray[np.int32]
    offset: float
    uncertainty: ScanUncertainty | None = None

    def mask(self, structure: str, start: int, stop: int) -> Mask:
        """Slices start to stop of a mask, bool (rows, columns, slices), oriented (posterior, left, superior)."""
        rows, columns, _ = self.scan.grid.oriented_shape
        flat = [np.unpackbits(one, count=rows * columns) for one in self.packed[structure][start:stop]]
        # Contiguous slices, as `Predictor.to_native_grid` has them.
        return np.moveaxis(np.stack(flat).view(bool).reshape(len(flat), rows, columns), 0, -1)

    def uncertainty_map(self, start: int, stop: int) -> npt.NDArray[np.uint8] | None:
        """Slices start to stop of the uncertainty map, uint8 (rows, columns, slices), see `UNCERTAINTY_STEPS`."""
        if self.uncertainty is None:
            return None
        rows, columns, _ = self.scan.grid.oriented_shape
        flat = [np.frombuffer(zlib.decompress(one), np.uint8) for one in self.uncertainty.packed[start:stop]]
        return np.moveaxis(np.stack(flat).reshape(len(flat), rows, columns), 0, -1)

    def hu(self, start: int, stop: int) -> FloatArray:
        """Slices start to stop in Hounsfield units, float32 (rows, columns, slices)."""
        return self.scan.read_slices(start, stop).to_hu(self.offset)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of as many slices as are in memory at a time."""
        slices, step = len(self.boxes), NATIVE_CHUNK_SLICES
        return ((start, min(start + step, slices)) for start in range(0, slices, step))

    @property
    def body_columns(self) -> tuple[int, int]:
        """First and last column of the body."""
        return body_columns(self.boxes)


def segment_opened(
    scan: Scan, predictor: Predictor, name: str, paths: Iterable[Path] = (), *, uncertainty: bool = False
) -> SegmentedScan:
    """Runs the models over an open scan of that name, and writes its masks to `paths`, as `mask_paths` gives them.

    Each file appears atomically; for `uncertainty` see `segment_scan`.

    Raises:
      InputError: the scan is bad, a file cannot be written, or there is no infection to be uncertain of.
    """
    if uncertainty and predictor.infection is None:
        raise InputError("`uncertainty`: of the infection; give `infection_checkpoint` too, or leave it out")
    slices = scan.grid.oriented_shape[-1]
    by_model, pasted = (-(-slices // step) for step in (CHUNK_SLICES, NATIVE_CHUNK_SLICES))
    passes = 1 + len(MEMBERS) * uncertainty
    offset = air_offset(scan, predictor.preprocess)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(name, passes * by_model + pasted))

        def new_array(shape: tuple[int, ...]) -> FloatArray:
            """Zeros in a temporary file; a full disk is reported here, not by a signal."""
            file = stack.enter_context(temporary_file(4 * int(np.prod(shape)), name))
            return np.memmap(file, np.float32, "r+", shape=shape)

        found: dict[str, FloatArray] = {}
        boxes: list[npt.NDArray[np.int32]] = []
        prepared = prefetch(iter_chunks(scan, predictor.preprocess, offset))
        for start, chunk, chunk_boxes in stack.enter_context(contextlib.closing(prepared)):
            maps = predictor.slice_probabilities(chunk)
            if not found:
                shape = (slices, *chunk.shape[1:])
                found = {key: new_array(shape[:-1]) for key in maps}
                images = new_array(shape) if uncertainty else None
            for key, values in maps.items():
                found[key][start : start + len(chunk)] = values
            if images is not None:
                images[start : start + len(chunk)] = chunk
            _release_free_memory()
            boxes.append(chunk_boxes)
            advance("")
        all_boxes = np.concatenate(boxes)
        added = predictor.postprocess(found, all_boxes, scan.grid)
        mean, agreed = None, None
        if images is not None:
            mean, dice = compare_members(predictor, images, all_boxes, scan.grid, new_array=new_array, advance=advance)
            agreed = ScanUncertainty(len(MEMBERS), dice)
            if added is not None:
                np.copyto(mean, found["infection"], where=added)
        packed: dict[str, list[npt.NDArray[np.uint8]]] = {structure: [] for structure in found}
        profiles = {structure: np.zeros(scan.grid.oriented_shape[1], np.int64) for structure in found}
        segmented = SegmentedScan(scan, predictor, packed, profiles, all_boxes, offset, agreed)
        _paste(segmented, found, mean, list(paths), advance)
    return segmented


def _paste(
    segmented: SegmentedScan,
    found: Mapping[str, FloatArray],
    mean: FloatArray | None,
    paths: list[Path],
    advance: Callable[[str], None],
) -> None:
    """From probabilities to native masks, and from the members' mean to its map: packed in memory, and in the files."""
    grid, predictor = segmented.scan.grid, segmented.predictor
    # All are written before the first one gets its name: old and new masks never lie side by side.
    with contextlib.ExitStack() as names, contextlib.ExitStack() as stack:
        writers = []
        for path in paths:
            make_output_dir(path.parent)
            partial = names.enter_context(atomic_file(path))
            kind = np.float32 if path.name.endswith("_probability.nii.gz") else np.uint8
            writers.append((path, stack.enter_context(slice_writer(partial, kind, grid, path))))
        for start, stop in segmented.chunks():
            some = {structure: array[start:stop] for structure, array in found.items()}
            native = predictor.to_native_grid(some, segmented.boxes[start:stop], grid.oriented_shape[:2])
            for structure, (_, mask) in native.items():
                segmented.packed[structure].extend(np.packbits(mask[..., k]) for k in range(stop - start))
                segmented.profiles[structure][:] += mask.sum(axis=(0, 2))
            if mean is not None and segmented.uncertainty is not None:
                segmented.uncertainty.packed.extend(_packed_map(segmented, mean, start, stop))
            for path, write in writers:
                write(start, _to_write(segmented, native, path.name, start, stop))
            advance("")


def _packed_map(segmented: SegmentedScan, mean: FloatArray, start: int, stop: int) -> Iterator[bytes]:
    """Of each slice its uncertainty map, see `ScanUncertainty`."""
    predictor, shape = segmented.predictor, segmented.scan.grid.oriented_shape[:2]
    native = predictor.to_native_grid({"infection": mean[start:stop]}, segmented.boxes[start:stop], shape)
    reported = predictor.reported_probability("infection", native["infection"])
    for k in range(stop - start):
        yield zlib.compress(uncertainty_map(reported[..., k]).tobytes(), 1)


def _to_write(
    segmented: SegmentedScan, native: Mapping[str, NativeSlices], name: str, start: int, stop: int
) -> npt.NDArray[Any]:
    """What goes into the file of that name."""
    if name.endswith(UNCERTAINTY):
        uncertainty = segmented.uncertainty_map(start, stop)
        assert uncertainty is not None  # its path is given where it is asked for
        return uncertainty
    structure = next(s for s in native if name.endswith((f"_{s}.nii.gz", f"_{s}_probability.nii.gz")))
    if name.endswith("_probability.nii.gz"):
        return segmented.predictor.reported_probability(structure, native[structure])
    return native[structure].mask.astype(np.uint8)


def _release_free_memory() -> None:
    """Returns to the system what compiling and the models have freed: glibc's malloc keeps it, for each thread anew."""
    with contextlib.suppress(AttributeError, TypeError):  # another malloc; Windows
        ctypes.CDLL(None).malloc_trim(0)
