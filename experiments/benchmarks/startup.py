"""What a person waits for: imports, --help, compilation, the first masks, the quickstart."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import Row, in_subprocess, row, timed
from benchmarks.prediction import phantom_scan

_COMPILE = """
import sys, time
import jax
from benchmarks.training import FULL, Setting, config_of, make_batch
from resunet_jax.training.step import create_state, make_optimizer, make_train_step

jax.config.update("jax_compilation_cache_dir", {cache!r})
config = config_of(Setting(FULL, 128, "float32"))
optimizer = make_optimizer(config, 100)
state = create_state(config, optimizer)
step = jax.jit(make_train_step(config, optimizer), donate_argnums=0)
start = time.perf_counter()
step.lower(state, make_batch(8, 128), jax.random.key(0), None).compile()
print(time.perf_counter() - start)
"""

_SLICES = 40
SCRIPTS = ("train_lung", "train_infection", "evaluate", "predict", "cross_validate", "quickstart")


def startup_suite(rounds: int, experiments: Path) -> list[Row]:
    """Seconds, each in a process of its own.

    Args:
      rounds: processes per figure.
      experiments: folder of the scripts.
    """
    rows = [
        row("startup", code, "s", [in_subprocess(code)[1] for _ in range(rounds)], max_value=limit)
        for code, limit in (("import resunet_jax", 1.5), ("import jax", None), ("from resunet_jax import *", None))
    ]
    for script in SCRIPTS:
        code = (
            f"import runpy, sys; sys.path.insert(0, {str(experiments)!r}); sys.argv = ['{script}.py', '--help']\n"
            f"try: runpy.run_path({str(experiments / (script + '.py'))!r}, run_name='__main__')\n"
            "except SystemExit: pass"
        )
        rows.append(
            row("startup", f"{script}.py --help", "s", [in_subprocess(code)[1] for _ in range(rounds)], max_value=2)
        )
    cold, cached = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            code = _COMPILE.format(cache=cache)
            cold.append(float(in_subprocess(code)[0]))
            cached.append(float(in_subprocess(code)[0]))
    name = "first step, full width, 128², batch 8: tracing and compilation"
    rows.append(row("startup", f"{name}, cold", "s", cold, max_value=15))
    rows.append(row("startup", f"{name}, from the compilation cache", "s", cached, max_value=3))
    return [*rows, *_first_masks(rounds, experiments / "predict.py"), _quickstart(experiments / "quickstart.py")]


def _first_masks(rounds: int, predict: Path) -> list[Row]:
    """From the command to the masks of a scan, by the shipped pair."""
    empty: list[float] = []
    filled: list[float] = []
    with phantom_scan(_SLICES) as scan, tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            flags = [f"--input={scan}", f"--compilation_cache_dir={folder}/cache_{turn}", "--noreport"]
            for name, seconds in (("empty", empty), ("filled", filled)):
                command = [sys.executable, predict, *flags, f"--output_dir={folder}/{name}_{turn}"]
                seconds.append(timed(partial(subprocess.run, command, check=True, capture_output=True)))
    what = f"predict, masks of 512×512×{_SLICES}, compilation cache"
    return [
        row("startup", f"{what} empty", "s", empty, max_value=12),
        row("startup", f"{what} filled", "s", filled, max_value=5),
    ]


def _quickstart(script: Path) -> Row:
    """The whole of it, once, with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, f"--output_dir={folder}/run", f"--compilation_cache_dir={folder}/cache"]
        seconds = timed(partial(subprocess.run, command, check=True, capture_output=True))
    return row("startup", "quickstart", "s", [seconds], max_value=180)
