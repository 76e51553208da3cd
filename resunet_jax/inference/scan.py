"""One scan: from its file to masks on its own grid, a chunk of slices in memory at a time."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.preprocess import air_offset, prepare_volume
from resunet_jax.data.readers import READERS, Reader, Source, find_sources, open_scan
from resunet_jax.data.readers.disk import temporary_file
from resunet_jax.data.readers.nifti import nifti_writer
from resunet_jax.data.roi import body_columns
from resunet_jax.data.volume import FloatArray, Scan
from resunet_jax.files import make_output_dir
from resunet_jax.inference.predictor import Predictor
from resunet_jax.progress import progress

_CHUNK_SLICES = 32  # of a scan at a time: a scan may have any number of them

_T = TypeVar("_T")
Mask = npt.NDArray[np.bool_]


def segment_scan(
    scan: str | Path,
    output_dir: str | Path,
    predictor: Predictor,
    *,
    save_probabilities: bool = False,
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
      save_probabilities: also writes the probabilities, float32 in [0, 1].
      readers: the table of formats.
      assumed: see `open_scan`.

    Returns:
      the files written.

    Raises:
      InputError: the scan is bad, or the folder cannot be written.
    """
    source = find_sources(Path(scan), readers)[0]
    with open_scan(source, readers, assumed=assumed, physical=predictor.preprocess.is_physical) as opened:
        paths = mask_paths(source, Path(output_dir), predictor, save_probabilities)
        segment_opened(opened, predictor, source.path.name, paths)
        return paths


def mask_paths(scan: Source, output_dir: Path, predictor: Predictor, save_probabilities: bool) -> list[Path]:
    """`<scan>_lung.nii.gz` and so on, and with probabilities `<scan>_lung_probability.nii.gz` and so on."""
    kinds = ("", "_probability") if save_probabilities else ("",)
    return [output_dir / f"{scan.name}_{name}{kind}.nii.gz" for name in predictor.structures for kind in kinds]


@dataclasses.dataclass(frozen=True)
class ScanChunk:
    """Some slices of a scan, ready for the models.

    Attributes:
      start: number of the first slice.
      images: float32 (slices, S, S) in [0, 1].
      boxes: int32 (slices, 4), see `prepare_volume`.
    """

    start: int
    images: FloatArray
    boxes: npt.NDArray[np.int32]


def iter_chunks(scan: Scan, preprocess: PreprocessConfig, offset: float) -> Iterator[ScanChunk]:
    """The slices of an open scan, a chunk in memory at a time; `offset` as in `air_offset`."""
    slices = scan.grid.oriented_shape[-1]
    for start in range(0, slices, _CHUNK_SLICES):
        volume = scan.read_slices(start, min(start + _CHUNK_SLICES, slices))
        yield ScanChunk(start, *prepare_volume(volume, preprocess, offset))


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
    """

    scan: Scan
    predictor: Predictor
    packed: Mapping[str, list[npt.NDArray[np.uint8]]]
    profiles: Mapping[str, npt.NDArray[np.int64]]
    boxes: npt.NDArray[np.int32]
    offset: float

    def mask(self, structure: str, start: int, stop: int) -> Mask:
        """Slices start to stop of a mask, bool (rows, columns, slices), oriented (posterior, left, superior)."""
        rows, columns, _ = self.scan.grid.oriented_shape
        flat = [np.unpackbits(one, count=rows * columns) for one in self.packed[structure][start:stop]]
        # Contiguous slices, as `Predictor.to_native_grid` has them.
        return np.moveaxis(np.stack(flat).view(bool).reshape(len(flat), rows, columns), 0, -1)

    def hu(self, start: int, stop: int) -> FloatArray:
        """Slices start to stop in Hounsfield units, float32 (rows, columns, slices)."""
        return self.scan.read_slices(start, stop).to_hu(self.offset)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of as many slices as fit in memory at a time."""
        slices = len(self.boxes)
        return ((start, min(start + _CHUNK_SLICES, slices)) for start in range(0, slices, _CHUNK_SLICES))

    @property
    def body_columns(self) -> tuple[int, int]:
        """First and last column of the body."""
        return body_columns(self.boxes)


def segment_opened(scan: Scan, predictor: Predictor, name: str, paths: Iterable[Path] = ()) -> SegmentedScan:
    """Runs the models over an open scan, and writes its masks.

    Args:
      scan: the scan.
      predictor: the models.
      name: of the scan, for progress.
      paths: as `mask_paths` gives them; each appears atomically.

    Raises:
      InputError: the scan is bad, or a file cannot be written.
    """
    slices = scan.grid.oriented_shape[-1]
    chunks = -(-slices // _CHUNK_SLICES)
    offset = air_offset(scan, predictor.preprocess)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(name, 2 * chunks))
        found: dict[str, FloatArray] = {}
        boxes: list[npt.NDArray[np.int32]] = []
        prepared = prefetch(iter_chunks(scan, predictor.preprocess, offset))
        for chunk in stack.enter_context(contextlib.closing(prepared)):
            if not found:
                shape = (slices, *chunk.images.shape[1:])
                found = {
                    structure: stack.enter_context(_temp_memmap(shape, name)) for structure in predictor.structures
                }
            for structure, probabilities in predictor.slice_probabilities(chunk.images).items():
                found[structure][chunk.start : chunk.start + len(probabilities)] = probabilities
            boxes.append(chunk.boxes)
            advance("")
        all_boxes = np.concatenate(boxes)
        predictor.postprocess(found, all_boxes, scan.grid)
        segmented = SegmentedScan(scan, predictor, {s: [] for s in found}, _no_profiles(scan, found), all_boxes, offset)
        _paste(segmented, found, list(paths), advance)
    return segmented


def _no_profiles(scan: Scan, structures: Iterable[str]) -> dict[str, npt.NDArray[np.int64]]:
    return {structure: np.zeros(scan.grid.oriented_shape[1], np.int64) for structure in structures}


def _paste(
    segmented: SegmentedScan, found: Mapping[str, FloatArray], paths: list[Path], advance: Callable[[str], None]
) -> None:
    """From probabilities to native masks: packed in memory, and in the files."""
    grid, predictor = segmented.scan.grid, segmented.predictor
    with contextlib.ExitStack() as stack:
        writers = []
        for path in paths:
            make_output_dir(path.parent)
            kind = np.float32 if path.name.endswith("_probability.nii.gz") else np.uint8
            writers.append((path, stack.enter_context(nifti_writer(path, kind, grid))))
        for start, stop in segmented.chunks():
            some = {structure: array[start:stop] for structure, array in found.items()}
            native = predictor.to_native_grid(some, segmented.boxes[start:stop], grid.oriented_shape[:2])
            for structure, (_, mask) in native.items():
                segmented.packed[structure].extend(np.packbits(mask[..., k]) for k in range(stop - start))
                segmented.profiles[structure][:] += mask.sum(axis=(0, 2))
            for path, write in writers:
                structure = next(s for s in native if path.name.endswith((f"_{s}.nii.gz", f"_{s}_probability.nii.gz")))
                is_mask = not path.name.endswith("_probability.nii.gz")
                write(start, native[structure].mask.astype(np.uint8) if is_mask else native[structure].probability)
            advance("")


@contextlib.contextmanager
def _temp_memmap(shape: tuple[int, ...], name: str) -> Iterator[FloatArray]:
    """Zeros, float32, in a temporary file that is gone afterwards; a full disk is reported here, not by a signal."""
    with temporary_file(4 * int(np.prod(shape)), name) as file:
        yield np.memmap(file, np.float32, "r+", shape=shape)
