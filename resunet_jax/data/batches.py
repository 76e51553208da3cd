"""Slices to batches, by grain: shuffled and repeated for training, padded and marked for evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
import numpy.typing as npt

from resunet_jax.config import Structure
from resunet_jax.data.slice_cache import PreparedCase

_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)  # more only wait for each other (the GIL)


class Batch(TypedDict):
    """One batch of slices.

    Keys:
      image: float32 (N, S, S, C) in [0, 1], see `prepare_volume`.
      mask: uint8 (N, S, S, 1 + C), 0 or 1: the target, and for augmentation the infection in each channel of the image,
        0 where it is not known.
      valid: bool (N,), False for slices that only fill up the last batch of an evaluation.
      index: int32 (N,), the slice's place in its `SliceSource`.
    """

    image: Any
    mask: Any
    valid: Any
    index: Any


class SliceSource:
    """All slices of some cases, by number; thread-safe."""

    def __init__(self, cases: Sequence[PreparedCase], target: Structure) -> None:
        """Takes cases that all have the target's mask."""
        self._images = [case.images for case in cases]
        self._targets = [getattr(case, target) for case in cases]
        self._infection = [case.infection for case in cases]
        self._case_ids = [case.case.id for case in cases]
        self._starts = np.cumsum([0] + [len(images) for images in self._images])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: npt.NDArray[np.integer[Any]], size: int) -> Batch:
        """Some slices by their indices, filled up with zeros to `size` slices."""
        *shape, channels = size, *self._images[0].shape[1:]
        image, mask = np.zeros((*shape, channels), np.float32), np.zeros((*shape, 1 + channels), np.uint8)
        index, valid = np.zeros(size, np.int32), np.arange(size) < len(indices)
        index[: len(indices)] = indices
        cases = np.searchsorted(self._starts, indices, side="right") - 1
        for i, (case, k) in enumerate(zip(cases, indices - self._starts[cases], strict=True)):
            image[i] = self._images[case][k]
            mask[i, ..., 0] = self._targets[case][k, ..., 0]
            if (infection := self._infection[case]) is not None:
                mask[i, ..., 1:] = infection[k]
        return Batch(image=image, mask=mask, valid=valid, index=index)

    def names(self, indices: Sequence[int]) -> list[str]:
        """Case id and number of some slices, for people to read."""
        cases = np.searchsorted(self._starts, indices, side="right") - 1
        return [f"{self._case_ids[c]} slice {i - self._starts[c]}" for c, i in zip(cases, indices, strict=True)]


@dataclasses.dataclass(frozen=True)
class ProcessShard:
    """The slices of each batch that this process reads: equally many, in the order of the processes.

    Attributes:
      process: number of this process.
      processes: how many there are; the batch size is a multiple of it.
      to_devices: puts a shard on this process's devices.
    """

    to_devices: Callable[[Batch], Batch]
    process: int = 0
    processes: int = 1


def train_batches(source: SliceSource, batch_size: int, seed: int, shard: ProcessShard, start: int = 0) -> Any:
    """Endless batches in an order that the seed decides; each slice comes once before any comes twice.

    Args:
      source: the slices.
      batch_size: N, over all processes.
      seed: of the order.
      shard: of this process; batches are on its devices before they are asked for.
      start: number of the first batch, counted from 0, from which a training resumes.

    Returns:
      a grain iterator.
    """
    indices = (
        grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None).batch(batch_size, drop_remainder=True)
    )
    dataset = grain.experimental.ThreadPrefetchIterDataset(
        _read(indices, source, batch_size, shard), prefetch_buffer_size=2
    )
    batches = iter(dataset)
    grain.experimental.set_next_index(batches, start)
    return batches


def eval_batches(source: SliceSource, batch_size: int, shard: ProcessShard) -> Any:
    """Every slice once and in order; the last batch is filled up with zeros, marked by `valid`."""
    return _read(grain.MapDataset.range(len(source)).batch(batch_size), source, batch_size, shard)


def _read(indices: grain.MapDataset, source: SliceSource, batch_size: int, shard: ProcessShard) -> grain.IterDataset:
    size = batch_size // shard.processes

    def read(batch: npt.NDArray[np.integer[Any]]) -> Batch:
        return source.batch(batch[shard.process * size : (shard.process + 1) * size], size)

    dataset = indices.map(read).to_iter_dataset(_READ)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4).map(shard.to_devices)
