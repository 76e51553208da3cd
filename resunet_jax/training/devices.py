"""Devices and processes of a training: the batch is distributed over them, the state is replicated."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resunet_jax.data.batches import Batch, ProcessShard
from resunet_jax.errors import InputError
from resunet_jax.weights.store import require_backend

_AXIS = "data"


def make_mesh(count: int | None, batch_size: int) -> Mesh:
    """A mesh with one axis, "data".

    Args:
      count: devices to use, or None for all; where there are several processes, all.
      batch_size: slices per step, distributed evenly.

    Raises:
      InputError: JAX cannot start, there are not so many devices, or the batch cannot be divided evenly.
    """
    require_backend()
    devices = jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise InputError(f"`devices={count}`: this machine has {len(devices)}; give 1 to {len(devices)}, or all")
    if jax.process_count() > 1 and count not in (None, len(devices)):
        raise InputError(f"`devices={count}`: several processes use all their devices; give `devices=all`")
    chosen = devices[:count]
    if batch_size % len(chosen):
        raise InputError(f"batch_size is {batch_size}; it must be a multiple of the {len(chosen)} devices")
    return Mesh(chosen, (_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on each device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays on each device of each process; by way of the host, which alone may be moved to other processes."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))


def process_shard(mesh: Mesh) -> ProcessShard:
    """What this process reads of each batch, and how it gets to the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))

    def to_devices(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    return ProcessShard(to_devices, jax.process_index(), jax.process_count())


def is_primary() -> bool:
    """Whether this process is the one that writes and logs."""
    return bool(jax.process_index() == 0)


def barrier(what: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
