"""Slices of a scan as compact bytes: grey levels in steps of 10 HU, masks, and optionally uncertainty.

A plane is packed as the residuals of the median edge detector (LOCO-I, Weinberger et al. 2000), compressed by zlib: on
noisy CT as small as PNG or smaller, and the page decodes it itself, so that neither colour management nor a browser's
protection against fingerprinting can change a value.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes2D = npt.NDArray[np.uint8]

HU_LOWEST = -1350
HU_STEP = 10
"""Level v of 0..255 stands for HU_LOWEST + HU_STEP * v; values outside -1350..1200 HU are clipped."""
INFECTION_BIT = 4
"""A mask byte is the label of the lung (0, 1 left, 2 right), plus 4 where infected."""

WIDTHS = (320, 288, 256)
"""Shown pixels along the longer side of the body's box; the first that fits the budget is taken, else the last."""
_BUDGET = 11_400_000  # bytes of packed slices: with base 85 and the rest, a page below 15 MB
_BODY_HU = -500.0


class EncodedSlice(NamedTuple):
    """One slice, all its voxels.

    Attributes:
      shape: (rows, columns).
      planes: gives the planes by name, each uint8 (rows, columns): "ct", see `HU_STEP`, "masks", see `INFECTION_BIT`,
        and "uncertainty", 0..100, where there is one.
      box: rows and columns of the body, (first, end, first, end); None where the slice shows none.
    """

    shape: tuple[int, int]
    planes: Callable[[], Mapping[str, Bytes2D]]
    box: tuple[int, int, int, int] | None


class Sampling(NamedTuple):
    """Which voxels are shown: the rows and columns of the scan, ascending, one for each pixel; int arrays."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]

    def __call__(self, plane: Bytes2D) -> Bytes2D:
        """The shown pixels of a plane of the whole slice."""
        return plane[self.rows[:, None], self.columns]


def encode_slices(
    hu: npt.NDArray[np.float32],
    lung: npt.NDArray[np.uint8],
    infection: npt.NDArray[np.bool_],
    *,
    uncertainty: Bytes2D | None = None,
    file: BinaryIO,
) -> list[EncodedSlice]:
    """Encodes consecutive axial slices; to be called chunk by chunk.

    Args:
      hu: float32 (rows, columns, n) in Hounsfield units, finite; rows to posterior, columns to the patient's left.
      lung: uint8 (rows, columns, n): 0, 1 left, 2 right.
      infection: bool (rows, columns, n).
      uncertainty: uint8 (rows, columns, n), as `uncertainty_map` gives it, or None.
      file: where the planes are kept, from its position on; open as long as slices are read.

    Returns:
      n slices, in the same order.

    Raises:
      ValueError: the shapes differ, or a lung label is not 0, 1 or 2.
    """
    shapes = [hu.shape, lung.shape, infection.shape, *([] if uncertainty is None else [uncertainty.shape])]
    if hu.ndim != 3 or any(shape != hu.shape for shape in shapes):
        raise ValueError(f"expected arrays of one shape (rows, columns, n), found {shapes}")
    if lung.size and lung.max() > 2:
        raise ValueError(f"expected lung labels 0, 1 and 2, found {lung.max()}")
    encoded = []
    for k in range(hu.shape[-1]):
        levels = np.clip(np.rint((hu[..., k] - HU_LOWEST) / HU_STEP), 0, 255).astype(np.uint8)
        masks = (lung[..., k] + INFECTION_BIT * (infection[..., k] > 0)).astype(np.uint8)
        planes = {"ct": levels, "masks": masks}
        if uncertainty is not None:
            planes["uncertainty"] = uncertainty[..., k]
        box = _body_box((hu[..., k] > _BODY_HU), masks > 0)
        encoded.append(EncodedSlice((hu.shape[0], hu.shape[1]), _keep(planes, file), box))
    return encoded


def _keep(planes: Mapping[str, Bytes2D], file: BinaryIO) -> Callable[[], Mapping[str, Bytes2D]]:
    """Writes the planes, and gives them again from the file."""
    start = file.tell()
    file.writelines(plane.tobytes() for plane in planes.values())
    return functools.partial(_read_planes, file, start, tuple(planes), next(iter(planes.values())).shape)


def _read_planes(file: BinaryIO, start: int, names: Sequence[str], shape: tuple[int, int]) -> dict[str, Bytes2D]:
    file.seek(start)
    stored = np.frombuffer(file.read(len(names) * shape[0] * shape[1]), np.uint8).reshape(len(names), *shape)
    return dict(zip(names, stored, strict=True))


def _body_box(dense: npt.NDArray[np.bool_], masks: npt.NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Box of what is dense over a vertical run (a table is too thin) and of the masks."""
    run = max(1, dense.shape[0] // 40)
    sums = np.pad(np.cumsum(dense, axis=0, dtype=np.int32), ((1, 0), (0, 0)))
    solid = sums[run:] - sums[:-run] == run
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    mask_rows, mask_columns = np.flatnonzero(masks.any(1)), np.flatnonzero(masks.any(0))
    rows = np.concatenate([rows, rows + run - 1, mask_rows])
    columns = np.concatenate([columns, mask_columns])
    if not rows.size:
        return None
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def choose_sampling(slices: Sequence[EncodedSlice]) -> Sampling:
    """The body's box over all slices, and as many of its rows and columns as the size of the page allows."""
    shape = slices[0].shape
    boxes = np.array([s.box for s in slices if s.box is not None] or [(0, shape[0], 0, shape[1])])
    first, end = boxes[:, [0, 2]].min(0), boxes[:, [1, 3]].max(0)
    some = slices[:: max(1, len(slices) // 10)]
    for width in WIDTHS:
        sampling = _sample(first, end, width)
        size = sum(len(pack(sampling(plane))) for s in some for plane in s.planes().values())
        if size / len(some) * len(slices) <= _BUDGET:
            break
    return sampling


def _sample(first: npt.NDArray[np.int64], end: npt.NDArray[np.int64], width: int) -> Sampling:
    step = max(1.0, float((end - first).max()) / width)
    axes = [
        a + ((np.arange(max(1, int((b - a) / step))) + 0.5) * step).astype(int) for a, b in zip(first, end, strict=True)
    ]
    return Sampling(axes[0], axes[1])


def pack(plane: Bytes2D) -> bytes:
    """Compresses a uint8 plane (rows, columns) without loss: zlib of the median edge detector's residuals."""
    padded = np.pad(plane.astype(np.int16), ((1, 0), (1, 0)))
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    low, high = np.minimum(left, above), np.maximum(left, above)
    guess = np.where(corner >= high, low, np.where(corner <= low, high, left + above - corner))
    residuals = ((plane - guess) & 255).astype(np.uint8).tobytes()
    return min((_deflate(residuals, s) for s in (zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)), key=len)


def _deflate(data: bytes, strategy: int) -> bytes:
    stream = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
    return stream.compress(data) + stream.flush()
