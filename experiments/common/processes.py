"""One training on several devices and in several processes."""

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable

from absl import flags

from resunet_jax.errors import InputError, first_line

flags.disclaim_key_flags()  # flags are of the script that asks for them, so that its --help shows them

_HEARTBEAT_SECONDS = 30  # without one from a process, the others end


def define_device_flags() -> None:
    """Flags of the training scripts that distribute the work."""
    flags.DEFINE_string("devices", None, "Devices that share a batch: a number, or all; by default 1.")
    flags.DEFINE_bool("distributed", False, "One of several processes, which a cluster (SLURM, Open MPI, TPU) started.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where no cluster tells it.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def is_distributed() -> bool:
    """Whether this is one of several processes of a training."""
    if "jax" not in sys.modules:
        return False
    import jax

    return bool(jax.distributed.is_initialized())


def init_distributed() -> int | None:
    """Joins the other processes, if there are any; returns `devices` for `train`."""
    values = flags.FLAGS
    devices = values.devices or "1"
    given = (values.coordinator_address, values.num_processes, values.process_id)
    if values.distributed or given != (None, None, None):
        _join(*given)
        devices = values.devices or "all"
    try:
        return None if devices == "all" else int(devices)
    except ValueError as error:
        raise InputError(f"--devices={devices}: it must be a number, or all") from error


def _join(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    import jax

    if not flags.FLAGS.distributed and None in (address, num_processes, process_id):
        raise InputError("--coordinator_address, --num_processes and --process_id belong together; give all three")
    try:
        jax.distributed.initialize(address, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes do not come together ({first_line(error)}); check --coordinator_address and that all are up"
        ) from error
    faulthandler.disable()  # JAX ends a process whose fellow died with a message, which stacks would bury
    if jax.process_index() > 0:
        logging.getLogger("resunet_jax").setLevel(logging.ERROR)


def stop_signals() -> Callable[[int], bool]:
    """All must stop at the same step: JAX hears SIGTERM, and tells the others."""
    from jax.experimental import multihost_utils

    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    reached: Callable[[int], bool] = multihost_utils.reached_preemption_sync_point
    return reached
