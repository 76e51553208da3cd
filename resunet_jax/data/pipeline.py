"""Slices to batches, by grain: shuffled and repeated for training, padded and marked for evaluation."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypedDict

import grain
import numpy as np
import numpy.typing as npt

from resunet_jax.data.prepared import PreparedCase

Target = Literal["lung", "infection"]

_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)  # more only wait for each other (the GIL)


class Batch(TypedDict):
    """One batch of slices, or without the leading N one slice.

    Keys:
      image: float32 (N, S, S, 1) in [0, 1].
      mask: uint8 (N, S, S, 1), 0 or 1: the target.
      valid: bool (N,), False for slices that only fill up the last batch of an evaluation.
      index: int32 (N,), the slice's place in its `SliceSource`.
    """

    image: Any
    mask: Any
    valid: Any
    index: Any


class SliceSource:
    """All slices of some cases, by number; thread-safe."""

    def __init__(self, cases: Sequence[PreparedCase], target: Target) -> None:
        """Takes cases that all have the target's mask."""
        self._images = [case.images for case in cases]
        self._masks = [getattr(case, target) for case in cases]
        self._case_ids = [case.case.id for case in cases]
        self._starts = np.cumsum([0] + [len(images) for images in self._images])
        self._target = target

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Batch:
        one = self.batch(np.array([index]), 1)
        return Batch(image=one["image"][0], mask=one["mask"][0], valid=one["valid"][0], index=one["index"][0])

    def batch(self, indices: npt.NDArray[np.integer[Any]], size: int) -> Batch:
        """Some slices by their numbers, filled up with zeros to `size` slices."""
        side = self._images[0].shape[-1]
        image, mask = np.zeros((size, side, side, 1), np.float32), np.zeros((size, side, side, 1), np.uint8)
        index, valid = np.zeros(size, np.int32), np.arange(size) < len(indices)
        index[: len(indices)] = indices
        cases = np.searchsorted(self._starts, indices, side="right") - 1
        for i, (case, k) in enumerate(zip(cases, indices - self._starts[cases], strict=True)):
            image[i, ..., 0] = self._images[case][k]
            mask[i, ..., 0] = self._masks[case][k]
        return Batch(image=image, mask=mask, valid=valid, index=index)

    def __repr__(self) -> str:
        return f"SliceSource({self._target}, {len(self)} slices of {', '.join(self._case_ids)})"


def train_batches(source: SliceSource, batch_size: int, seed: int, device: Any) -> Any:
    """Endless batches in an order that the seed decides; each slice comes once before any comes twice.

    Args:
      source: the slices.
      batch_size: N.
      seed: of the order.
      device: a JAX device or sharding; batches are there before they are asked for.

    Returns:
      a grain iterator, whose state can be saved and restored.
    """
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat(None)
        .batch(batch_size, drop_remainder=True)
        .map(partial(source.batch, size=batch_size))
        .to_iter_dataset(_READ)
    )
    return iter(grain.experimental.device_put(dataset, device))


def eval_batches(source: SliceSource, batch_size: int) -> Any:
    """Every slice once and in order; the last batch is filled up with zeros, marked by `valid`."""
    numbers = grain.MapDataset.range(len(source)).batch(batch_size)
    return numbers.map(partial(source.batch, size=batch_size)).to_iter_dataset(_READ)
