"""Progress on anything over a few seconds: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger("resunet_jax")

_SECONDS_BETWEEN_LINES = 20.0
_T = TypeVar("_T")
_R = TypeVar("_R")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def progress(description: str, total: int) -> contextlib.AbstractContextManager[Callable[[str], None]]:
    """Shows how far a loop of `total` steps is, with rate and time left, on standard error.

    Returns:
      for a `with` block, a function to call after each step, with a short text to show (or "").
    """
    return (_bar if sys.stderr.isatty() else _lines)(description, total)


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


@contextlib.contextmanager
def _lines(description: str, total: int) -> Iterator[Callable[[str], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(note: str) -> None:
        nonlocal last, done
        done += 1
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES and done < total:
            last = now
            seconds = (now - start) / done
            rate = f"{1 / seconds:.1f}/s" if seconds < 2 else f"{seconds:.1f} s each"
            logger.info("%s: %d/%d, %s, %.0f s left %s", description, done, total, rate, (total - done) * seconds, note)

    yield advance


def parallel_map(description: str, function: Callable[[_T], _R], items: Sequence[_T], max_workers: int) -> list[_R]:
    """Applies a function to each item in threads, no more than cores, with progress; results are in the items' order.

    An error cancels what has not begun.
    """
    results = []
    with (
        ThreadPoolExecutor(min(max_workers, os.cpu_count() or 1)) as executor,
        progress(description, len(items)) as advance,
    ):
        for result in executor.map(function, items):
            results.append(result)
            advance("")
    return results
