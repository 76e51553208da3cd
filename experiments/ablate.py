"""Trains and tests recipes side by side, one thing changed at a time, and says what each is worth.

python experiments/ablate.py --data_dir=DATA --workdir=runs/ablation --protocol=patient_five_fold \
        --rows=original,robust --seeds=0,1,2 --filters=16,32,64,128 --epochs=15

Started several times at once, with the same --workdir, the processes share the runs out.
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.data.splits import FOLDED, FOLDS, SplitRequest
from resunet_jax.errors import InputError

FLAGS = flags.FLAGS
cli.define_training_flags()
flags.DEFINE_list("rows", [], "Rows of the table by name, the one to compare with first; by default all.")
flags.DEFINE_list("seeds", ["0", "1"], "Of the trainings.")
flags.DEFINE_enum("protocol", None, FOLDED, "How cases are shared out over the folds; all folds are run.")
flags.DEFINE_list("split_files", [], 'Instead of a protocol: JSON files {"train": [ids], "val": [], "test": [ids]}.')
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Runs the ablation by the flags."""
    from resunet_jax.evaluation.ablation import ablate, find_rows
    from resunet_jax.evaluation.ablation_table import print_ablation

    workdir = Path(FLAGS.workdir)
    summary = ablate(
        find_rows(FLAGS.rows),
        Path(FLAGS.data_dir),
        workdir,
        cli.cache_dir(),
        changes=cli.changes_from_flags(),
        seeds=_seeds(),
        splits=_splits(),
        should_stop=cli.stop_signals(),
    )
    print_ablation(summary)
    print(f"report: {workdir.resolve()}")


def _seeds() -> list[int]:
    if not FLAGS.seeds or not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise InputError(f"--seeds={','.join(FLAGS.seeds)}: wanted whole numbers, as in 0,1,2")
    return [int(seed) for seed in FLAGS.seeds]


def _splits() -> list[SplitRequest]:
    if bool(FLAGS.protocol) == bool(FLAGS.split_files):
        raise InputError("give either --protocol or --split_files")
    if FLAGS.split_files:
        return [SplitRequest(Path(file).expanduser()) for file in FLAGS.split_files]
    return [
        SplitRequest(protocol=FLAGS.protocol, fold=fold, allow_missing=FLAGS.allow_missing) for fold in range(FOLDS)
    ]


if __name__ == "__main__":
    cli.run(main)
