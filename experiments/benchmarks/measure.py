"""Figures: both sides interleaved, as medians, with their targets."""

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
from resunet_jax.training.train import versions


class Row(NamedTuple):
    """One figure.

    Attributes:
      suite: "train", "fit", "forward", "data", "predict", "evaluate", "memory" or "startup".
      name: what was measured.
      unit: of `jax` and `baseline`; "/s" is better when larger, all others when smaller.
      jax: median of this project.
      baseline: median of PyTorch, or of the other way that `name` says; None where there is none.
      ratio: `jax` to `baseline`; None without a baseline.
      target: in words; empty where there is none.
      passed: whether it is reached; None without a target.
      spread: smallest and largest of `jax`, then of `baseline`.
    """

    suite: str
    name: str
    unit: str
    jax: float
    baseline: float | None
    ratio: float | None
    target: str
    passed: bool | None
    spread: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, then those of 0.6.0 that are called otherwise today."""
        return {**self._asdict(), "ours": self.jax, "rival": self.baseline, "met": self.passed}


Run = Callable[[], Any]

# Linux's ru_maxrss of a process counts what its parent held when it was started; VmHWM does not.
_PRINT_PEAK = """
import pathlib, sys
status = pathlib.Path("/proc/self/status")
if status.is_file():
    peak = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
elif sys.platform == "win32":
    peak = float("nan")
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print("\\n", peak / 1e9)
"""


def timed(run: Run) -> float:
    """Seconds of one run; `run` waits for its result."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    jax_run: Run, baseline: Run | None, rounds: int, *, settle: bool = True
) -> tuple[list[float], list[float]]:
    """Seconds of both sides, interleaved.

    Args:
      jax_run: waits for its result.
      baseline: the same, or None.
      rounds: runs of each side; one more goes before them, as warm-up, and does not count.
      settle: runs each side once more, not measured, before each measured run. The system takes freed memory back while
        the other side runs; where work is one step after another, as training is, that does not happen.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(rounds + 1):
        for side, run in enumerate((jax_run, baseline)):
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
    jax_samples: Sequence[float],
    baseline_samples: Sequence[float] = (),
    *,
    max_value: float | None = None,
    min_value: float | None = None,
    max_ratio: float | None = None,
    min_ratio: float | None = None,
) -> Row:
    """A figure from samples of both sides.

    Args:
      suite: see `Row`.
      name: see `Row`.
      unit: see `Row`.
      jax_samples: at least one.
      baseline_samples: none where there is no baseline.
      max_value: target for the median of `jax_samples`, as the next.
      min_value: see `max_value`.
      max_ratio: target for the ratio of the medians, as the next; not reached where there is no baseline.
      min_ratio: see `max_ratio`.
    """
    median = statistics.median(jax_samples)
    baseline = statistics.median(baseline_samples) if baseline_samples else None
    ratio = median / baseline if baseline else None
    limits = {
        f"≤ {max_value} {unit}": (max_value, median, True),
        f"≥ {min_value} {unit}": (min_value, median, False),
        f"ratio ≤ {max_ratio}": (max_ratio, ratio, True),
        f"ratio ≥ {min_ratio}": (min_ratio, ratio, False),
    }
    targets = {
        text: found is not None and (found <= limit if upper else found >= limit)
        for text, (limit, found, upper) in limits.items()
        if limit is not None
    }
    passed = all(targets.values()) if targets else None
    spread = tuple(f(samples) for samples in (jax_samples, baseline_samples) if samples for f in (min, max))
    return Row(suite, name, unit, median, baseline, ratio, ", ".join(targets), passed, spread)


def print_rows(rows: Sequence[Row]) -> None:
    """A table in the terminal."""
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("suite", "what", "unit", "jax", "baseline", "ratio", "target", "passed"):
        table.add_column(name, justify="right" if name in ("jax", "baseline", "ratio") else "left")
    for r in rows:
        sides = [f"{low:.3g}–{high:.3g}" for low, high in zip(r.spread[::2], r.spread[1::2], strict=True)]
        medians = (
            "–" if value is None else f"{value:.3g}" + (f" ({spread})" if spread else "")
            for value, spread in zip((r.jax, r.baseline), [*sides, "", ""], strict=False)
        )
        ratio = "–" if r.ratio is None else f"{r.ratio:.2f}"
        passed = {True: "yes", False: "NO", None: ""}[r.passed]
        table.add_row(r.suite, r.name, r.unit, *medians, ratio, r.target, passed)
    wide_console().print(table)


def in_subprocess(code: str) -> tuple[str, float, float]:
    """Runs Python code, which can import this package, in a process of its own.

    Returns:
      what it printed, the seconds it took, and the most memory it held, in GB.

    Raises:
      InputError: it failed; the message is its last line.
    """
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _PRINT_PEAK],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise InputError(f"a benchmark failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    *output, peak = done.stdout.strip().splitlines()
    return "\n".join(output).strip(), seconds, float(peak)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, device, versions."""
    baseline = load_torch_baseline()
    return {
        **versions(),
        "torch": baseline.torch.__version__ if baseline else "not installed",
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


def load_torch_baseline() -> Any:
    """The module `torch_baseline`, or None where PyTorch is not installed."""
    try:
        return importlib.import_module("benchmarks.torch_baseline")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"
