"""Figures: both sides by turns, as medians, with the target beside them."""

import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.box import SIMPLE
from rich.table import Table

from resunet_jax.errors import InputError
from resunet_jax.evaluation.report import wide_console
from resunet_jax.training.run import versions


class Row(NamedTuple):
    """One figure.

    Attributes:
      suite: "train", "forward", "data", "predict", "memory" or "startup".
      name: what was measured.
      unit: of `ours` and `rival`; "/s" is better when larger, all others when smaller.
      ours: median.
      rival: median, or None where there is none.
      ratio: ours to rival; None without a rival.
      target: what is wanted, in words; empty where nothing is.
      met: whether it is; None without a target.
      spread: smallest and largest of ours, then of the rival's.
    """

    suite: str
    name: str
    unit: str
    ours: float
    rival: float | None
    ratio: float | None
    target: str
    met: bool | None
    spread: tuple[float, ...]


Run = Callable[[], Any]

# Linux's ru_maxrss of a process counts what its parent held when it was started; VmHWM does not.
_PRINT_PEAK = """
import pathlib, resource, sys
status = pathlib.Path("/proc/self/status")
if status.is_file():
    peak = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print("\\n", peak / 1e9)
"""


def timed(run: Run) -> float:
    """Seconds of one run; `run` waits for its result."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(ours: Run, rival: Run | None, rounds: int, *, settle: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of both sides, by turns.

    Args:
      ours: waits for its result.
      rival: the same, or None.
      rounds: turns of each side; one more goes before them, as warm-up, and does not count.
      settle: runs each side once more, not measured, when its turn begins. The system takes freed memory back while the
        other side runs; where work is one step after another, as training is, that does not happen.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(rounds + 1):
        for side, run in enumerate((ours, rival)):
            if run is None:
                continue
            if settle:
                run()
            taken = timed(run)
            if turn > 0:
                seconds[side].append(taken)
    return seconds


def row(
    suite: str,
    name: str,
    unit: str,
    ours: Sequence[float],
    rival: Sequence[float] = (),
    *,
    most: float | None = None,
    least: float | None = None,
    ratio_most: float | None = None,
    ratio_least: float | None = None,
) -> Row:
    """A figure from samples of both sides.

    Args:
      suite: see `Row`.
      name: see `Row`.
      unit: see `Row`.
      ours: samples.
      rival: samples; none where there is no rival.
      most: target for ours.
      least: target for ours.
      ratio_most: target for the ratio of ours to the rival's.
      ratio_least: target for the ratio of ours to the rival's.
    """
    middle = statistics.median(ours)
    other = statistics.median(rival) if rival else None
    ratio = middle / other if other else None
    wanted = {
        f"≤ {most} {unit}": (most, middle, True),
        f"≥ {least} {unit}": (least, middle, False),
        f"ratio ≤ {ratio_most}": (ratio_most, ratio, True),
        f"ratio ≥ {ratio_least}": (ratio_least, ratio, False),
    }
    targets = {
        text: found is not None and (found <= limit if upper else found >= limit)
        for text, (limit, found, upper) in wanted.items()
        if limit is not None
    }
    met = all(targets.values()) if targets else None
    spread = tuple(f(samples) for samples in (ours, rival) if samples for f in (min, max))
    return Row(suite, name, unit, middle, other, ratio, ", ".join(targets), met, spread)


def print_rows(rows: Sequence[Row]) -> None:
    """A table in the terminal."""
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("suite", "what", "unit", "ours", "rival", "ratio", "target", "met"):
        table.add_column(name, justify="right" if name in ("ours", "rival", "ratio") else "left")
    for r in rows:
        sides = [f"{low:.3g}–{high:.3g}" for low, high in zip(r.spread[::2], r.spread[1::2], strict=True)]
        ours, rival = (
            "–" if value is None else f"{value:.3g}" + (f" ({spread})" if spread else "")
            for value, spread in zip((r.ours, r.rival), [*sides, "", ""], strict=False)
        )
        ratio = "–" if r.ratio is None else f"{r.ratio:.2f}"
        table.add_row(
            r.suite, r.name, r.unit, ours, rival, ratio, r.target, {True: "yes", False: "NO", None: ""}[r.met]
        )
    wide_console().print(table)


def in_subprocess(code: str, *, environment: dict[str, str] | None = None) -> tuple[str, float, float]:
    """Runs Python code in a process of its own.

    Returns:
      what it printed, the seconds it took, and the most memory it held, in GB.

    Raises:
      InputError: it failed; the message is its last line.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _PRINT_PEAK],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise InputError(f"a benchmark failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    *output, peak = done.stdout.strip().splitlines()
    return "\n".join(output).strip(), seconds, float(peak)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, device, versions."""
    rival = load_rival()
    return {
        **versions(),
        "torch": rival.torch.__version__ if rival else "not installed",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_rival() -> Any:
    """The module `rival`, or None where PyTorch is not installed."""
    try:
        return importlib.import_module("resunet_jax.benchmark.rival")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"
