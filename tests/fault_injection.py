"""Runs a script that kills itself, by SIGKILL, at a chosen moment.

python tests/fault_injection.py MOMENT experiments/train_lung.py --flags
"""

import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """Before the n-th call of a function; or, where `item` is given, in the n-th call's result before that item."""

    module: str
    function: str
    call: int
    item: int = 0


FIT = "resunet_jax.training.loop"
WRITE = ("resunet_jax.weights.store", "write_json")  # config, history, digests of each checkpoint
MOMENTS = {
    "building the preprocessed cache": Moment("numpy", "save", 3),
    "drawing the first figures": Moment("resunet_jax.plots", "save_batch", 1),
    "a step of the first epoch": Moment("jax", "block_until_ready", 4),
    "the first validation": Moment(FIT, "eval_batches", 1, item=2),
    "the first checkpoint": Moment(*WRITE, 3),
    "between a checkpoint and the metrics": Moment(FIT, "write_history", 3),
    "deleting an old checkpoint": Moment("os", "rmdir", 12),
    "a later checkpoint": Moment("resunet_jax.weights.store", "_digests", 4),
    "a later validation": Moment(FIT, "eval_batches", 2, item=1),
    "drawing the last figures": Moment("resunet_jax.plots", "save_loss_curves", 1),
}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(moment: Moment) -> None:
    """Replaces the moment's function by one that kills."""
    module: Any = importlib.import_module(moment.module)
    function: Callable[..., Any] = getattr(module, moment.function)
    calls = 0

    def trapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.call and not moment.item:
            _kill()
        result = function(*args, **kwargs)
        return _items(result, moment.item) if calls == moment.call and moment.item else result

    setattr(module, moment.function, trapped)


def _items(items: Any, last: int) -> Iterator[Any]:
    for i, item in enumerate(items, start=1):
        if i == last:
            _kill()
        yield item


if __name__ == "__main__":
    name, script, *flags = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    set_trap(MOMENTS[name])
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
