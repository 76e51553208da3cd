"""Measures speed and memory, interleaved with PyTorch (extra [torch]) or another baseline.

python experiments/benchmark.py --suite=all --json=figures.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from common import settings
from common.run import run

from resunet_jax.errors import InputError
from resunet_jax.files import check_output_dir, make_output_dir, write_json

SUITES = ("train", "fit", "forward", "data", "predict", "evaluate", "memory", "startup")

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "all", [*SUITES, "all"], "What to measure.")
flags.DEFINE_integer(
    "rounds", 5, "Runs of each side; at most 2 of whole scans, 3 of processes; 1 of fit.", lower_bound=1
)
settings.define_path("json", "File for a list of {suite, name, unit, jax, baseline, ratio, target, passed, spread}.")


def main() -> None:
    """Measures by the flags."""
    from benchmarks.data import data_suite
    from benchmarks.evaluation import evaluation_suite
    from benchmarks.fit import fit_suite
    from benchmarks.measure import machine, on_gpu, print_rows
    from benchmarks.memory import memory_suite
    from benchmarks.prediction import predict_suite
    from benchmarks.startup import startup_suite
    from benchmarks.training import forward_suite, matrix_product, train_suite

    figures = settings.optional_path("json")
    if figures:
        check_output_dir(figures.parent)
    few = min(3, FLAGS.rounds)
    suites = {
        "train": lambda: train_suite(FLAGS.rounds),
        "fit": fit_suite,
        "forward": lambda: forward_suite(FLAGS.rounds),
        "data": lambda: data_suite(FLAGS.rounds),
        "predict": lambda: predict_suite(min(2, FLAGS.rounds)),
        "evaluate": lambda: evaluation_suite(few),
        "memory": lambda: memory_suite(few),
        "startup": lambda: startup_suite(few, Path(__file__).parent),
    }
    # Of all suites, before this process takes the device.
    records = [record for name in SUITES for record in _of_own_process(name)] if FLAGS.suite == "all" else []
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if FLAGS.suite == "all":
        rows = [] if on_gpu() else [matrix_product(FLAGS.rounds, ", after all suites")]
    else:
        rows = suites[FLAGS.suite]()
    print_rows(rows)
    records += [row.to_dict() for row in rows]
    if figures:
        make_output_dir(figures.parent, "json")
        write_json(figures, records)


def _of_own_process(suite: str) -> list[dict[str, Any]]:
    """The figures of a suite, which it prints too; what ran before in a process changes both sides by a fifth."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        flags_given = [f"--suite={suite}", f"--rounds={FLAGS.rounds}", f"--json={figures}"]
        if subprocess.run([sys.executable, sys.argv[0], *flags_given], check=False).returncode:
            raise InputError(f"the suite {suite} failed, see above")
        return list(json.loads(figures.read_text(encoding="utf-8")))


if __name__ == "__main__":
    run(main)
