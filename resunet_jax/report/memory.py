"""A scan in memory: from an array to masks and numbers, without a file."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resunet_jax.data.readers import with_intensity_scale
from resunet_jax.data.volume import Array, is_valid_affine, scan_from_array
from resunet_jax.errors import InputError
from resunet_jax.inference.predictor import Predictor, load_pretrained
from resunet_jax.inference.scan import segment_opened
from resunet_jax.report.numbers import Totals, iter_slices, measure

_NAME = "array"


class Segmentation(NamedTuple):
    """The masks of a scan, in the axes of its array.

    Attributes:
      lung: uint8 (x, y, z), 0 background, 1 left, 2 right lung.
      infection: bool, the same shape.
      report: the numbers, see `measure`.
    """

    lung: npt.NDArray[np.uint8]
    infection: npt.NDArray[np.bool_]
    report: dict[str, Any]


def segment_volume(hu: Array, affine: npt.NDArray[np.float64], model: Predictor | None = None) -> Segmentation:
    """Segments a scan in memory: `lung > 0` and `infection` are what `segment_scan` writes, voxel for voxel.

    Args:
      hu: (x, y, z), a number type, in Hounsfield units (or 0..255, see `infer_scale`).
      affine: (4, 4), voxel index to mm in RAS, as nibabel has it.
      model: a `Predictor` of both structures; by default `load_pretrained()`, which a caller of many scans should keep.

    Raises:
      InputError: not three axes, NaN or infinite voxels, a singular affine, no chest CT, or one model alone.
    """
    begun = time.perf_counter()
    hu, affine = np.asarray(hu), np.asarray(affine, np.float64)
    if hu.ndim != 3 or not hu.size or hu.dtype.kind not in "iuf":
        raise InputError(f"`hu`: shape {hu.shape} of {hu.dtype}; give real numbers with three axes")
    if affine.shape != (4, 4) or not is_valid_affine(affine):
        raise InputError(f"`affine`: {affine.tolist()}; give an invertible (4, 4) matrix from voxel index to mm")
    model = load_pretrained() if model is None else model
    if model.structures != ("lung", "infection"):
        raise InputError(f"`model`: it segments {' and '.join(model.structures)} only; give both models")
    scan = with_intensity_scale(scan_from_array(hu, affine), Path(_NAME), physical=model.preprocess.is_physical)
    segmented = segment_opened(scan, model, _NAME)
    totals = Totals(segmented)
    lung, infection = [], []
    for slices in iter_slices(segmented):
        totals.add(slices)
        lung.append(slices.lung)
        infection.append(slices.infection)
    report = measure(segmented, totals, {"name": _NAME, "file": "", "format": "array"}, time.perf_counter() - begun)
    grid = scan.grid
    return Segmentation(
        grid.from_pls(np.concatenate(lung, axis=-1)), grid.from_pls(np.concatenate(infection, axis=-1)), report
    )
