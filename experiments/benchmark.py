"""Measures speed and memory, interleaved with PyTorch (extra [torch]) or another baseline.

python experiments/benchmark.py --suite=all --json=figures.json
"""

import json
from pathlib import Path

from absl import flags
from common import settings
from common.run import run

from resunet_jax.files import write_text

SUITES = ("train", "fit", "forward", "data", "predict", "evaluate", "memory", "startup")

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "all", [*SUITES, "all"], "What to measure.")
flags.DEFINE_integer(
    "rounds", 5, "Runs of each side; at most 2 of whole scans, 3 of processes; 1 of fit.", lower_bound=1
)
settings.define_path("json", "File for a list of {suite, name, unit, jax, baseline, ratio, target, passed, spread}.")
flags.adopt_module_key_flags(settings)  # so that --help shows them


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
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows = []
    for name in SUITES if FLAGS.suite == "all" else [FLAGS.suite]:
        measured = suites[name]()
        print_rows(measured)
        rows += measured
    if FLAGS.suite == "all" and not on_gpu():
        rows.append(matrix_product(FLAGS.rounds, ", after all suites"))
        print_rows(rows[-1:])
    if FLAGS.json:
        records = [row.to_dict() for row in rows]
        write_text(settings.path("json"), json.dumps(records, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
