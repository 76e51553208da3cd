"""How much of the lungs is infected: involvement in percent, and a grade of it."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Mask = npt.NDArray[np.bool_]

GRADE_BOUNDS = (5.0, 25.0, 50.0, 75.0)
"""Lower bounds of grades 2 to 5, in % of involvement; grade 1 is above 0 and below the first."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


def grade(involvement_percent: float) -> int | None:
    """Severity of a lung or lobe, from 0 (none) to 5 (75 % and more); None where the involvement is NaN.

    The bands are those of a lobe in the CT severity score (Pan et al., Radiology 295(3), 2020), which is the sum over
    the five lobes, 0 to 25. Used on a whole lung they are a grade of this package, not that score.
    """
    if math.isnan(involvement_percent):
        return None
    return 0 if involvement_percent <= 0 else 1 + sum(involvement_percent >= bound for bound in GRADE_BOUNDS)


def involvement_percent(infected_voxels: int, lung_voxels: int) -> float:
    """Infected fraction of the lung in %, where both are counted within the lung mask; NaN without lung."""
    return 100 * infected_voxels / lung_voxels if lung_voxels else math.nan


def thirds(lung_voxels: npt.NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """The slices of the upper, middle and lower third of the lungs, by height.

    Args:
      lung_voxels: of each slice, from the lowest to the highest.

    Returns:
      {"upper": (first slice, one after the last), "middle": ..., "lower": ...}; empty ranges without lung.
    """
    with_lung = np.flatnonzero(lung_voxels)
    first, stop = (int(with_lung[0]), int(with_lung[-1]) + 1) if len(with_lung) else (0, 0)
    bounds = [first + round((stop - first) * i / 3) for i in range(4)]
    return {name: (bounds[i], bounds[i + 1]) for i, name in ((2, "upper"), (1, "middle"), (0, "lower"))}


def component_sizes(slices: Iterable[Mask]) -> npt.NDArray[np.int64]:
    """Sizes of the connected components (26 neighbours) of a mask that is given slice by slice, largest first.

    Args:
      slices: bool (rows, columns), in order; only two of them are in memory at a time.

    Returns:
      int64 (components,), in voxels.
    """
    sizes, edges = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    for size, touching in _components_by_slice(slices):
        sizes.append(size)
        edges.append(touching)
    size, edge = np.concatenate(sizes), np.concatenate(edges)
    graph = coo_array((np.ones(len(edge), bool), (edge[:, 0], edge[:, 1])), shape=(len(size), len(size)))
    count, component = connected_components(graph, directed=False) if len(size) else (0, np.zeros(0, int))
    totals = np.bincount(component, weights=size, minlength=count).astype(np.int64)
    return np.sort(totals)[::-1]


def _components_by_slice(slices: Iterable[Mask]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Of each slice, the sizes of its components, and which of them touch which of the slice before."""
    before, before_first, first = None, 0, 0
    for mask in slices:
        labels, count = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
        touching: npt.NDArray[np.int64] = np.zeros((0, 2), np.int64)
        if before is not None and count:
            rows, columns = np.nonzero(mask)
            around = np.pad(before, 1)
            below = np.stack([around[rows + i, columns + j] for i in range(3) for j in range(3)])
            own = np.broadcast_to(labels[rows, columns], below.shape)
            pairs = np.unique(below[below > 0].astype(np.int64) * (count + 1) + own[below > 0])
            touching = np.stack([pairs // (count + 1) + before_first - 1, pairs % (count + 1) + first - 1], axis=-1)
        yield np.bincount(labels.ravel(), minlength=count + 1)[1:], touching
        before, before_first, first = (labels if count else None), first, first + count
