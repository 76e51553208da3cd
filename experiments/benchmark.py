"""Measures speed and memory, both sides by turns: ours, and PyTorch (extra [torch]) or the plain way.

python experiments/benchmark.py --suite=all --json=figures.json
"""

import json
from pathlib import Path

import cli
from absl import flags

from resunet_jax.files import write_text

SUITES = ("train", "forward", "data", "predict", "memory", "startup")

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "all", [*SUITES, "all"], "What to measure.")
flags.DEFINE_integer("rounds", 5, "Turns of each side; at most 2 of whole scans, 3 of processes.", lower_bound=1)
flags.DEFINE_string("json", None, "File for a list of {suite, name, unit, ours, rival, ratio, target, met, spread}.")


def main() -> None:
    """Measures by the flags."""
    from resunet_jax.benchmark.data import data_suite
    from resunet_jax.benchmark.measure import machine, print_rows
    from resunet_jax.benchmark.memory import memory_suite
    from resunet_jax.benchmark.prediction import predict_suite
    from resunet_jax.benchmark.startup import startup_suite
    from resunet_jax.benchmark.training import forward_suite, train_suite

    few = min(3, FLAGS.rounds)
    suites = {
        "train": lambda: train_suite(FLAGS.rounds),
        "forward": lambda: forward_suite(FLAGS.rounds),
        "data": lambda: data_suite(FLAGS.rounds),
        "predict": lambda: predict_suite(min(2, FLAGS.rounds)),
        "memory": lambda: memory_suite(few),
        "startup": lambda: startup_suite(few, Path(__file__).parent),
    }
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows = []
    for name in SUITES if FLAGS.suite == "all" else [FLAGS.suite]:
        measured = suites[name]()
        print_rows(measured)
        rows += measured
    if FLAGS.json:
        write_text(Path(FLAGS.json), json.dumps([row._asdict() for row in rows], indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
