"""Ablation: trains and tests variants of the recipes, and compares them with the first one.

python experiments/ablate.py --data_dir=DATA --workdir=runs/ablation --protocol=patient_five_fold \
        --variants=original,robust --seeds=0,1,2 --filters=16,32,64,128 --epochs=15

Started several times at once with the same --workdir, the processes share the runs.
"""

from absl import flags
from common import settings
from common.run import run

from resunet_jax.data.splits import FOLD_PROTOCOLS, NUM_FOLDS, SplitRequest
from resunet_jax.errors import InputError
from resunet_jax.files import expand_user

FLAGS = flags.FLAGS
settings.define_training_flags()
settings.define_initial_pair_flags()
flags.DEFINE_list("variants", [], "Names from resunet_jax/studies/variants.py, the baseline first; by default all.")
flags.DEFINE_alias("rows", "variants")  # its name in 0.6.0
flags.DEFINE_list("seeds", ["0", "1"], "Of the trainings.")
flags.DEFINE_enum("protocol", None, FOLD_PROTOCOLS, "How cases are split; all folds are run.")
flags.DEFINE_list("split_files", [], 'Instead of a protocol: JSON files {"train": [ids], "val": [], "test": [ids]}.')


def main() -> None:
    """Runs the ablation by the flags."""
    from resunet_jax.studies.runner import ablate
    from resunet_jax.studies.table import print_ablation
    from resunet_jax.studies.variants import find_variants

    study, changes = settings.study(), settings.changes_from_flags()
    if "train.seed" in changes:
        raise InputError("--set=train.seed: the seeds of an ablation are given by --seeds")
    summary = ablate(
        study,
        find_variants(FLAGS.variants),
        changes=changes,
        seeds=_seeds(),
        splits=_splits(),
    )
    print_ablation(summary)
    print(f"report: {study.workdir.resolve()}")


def _seeds() -> list[int]:
    if not FLAGS.seeds or not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise InputError(f"--seeds={','.join(FLAGS.seeds)}: they must be whole numbers, as in 0,1,2")
    return [int(seed) for seed in FLAGS.seeds]


def _splits() -> list[SplitRequest]:
    if bool(FLAGS.protocol) == bool(FLAGS.split_files):
        raise InputError("give either --protocol or --split_files")
    if FLAGS.split_files:
        return [SplitRequest(expand_user(file), allow_missing=FLAGS.allow_missing) for file in FLAGS.split_files]
    return [
        SplitRequest(protocol=FLAGS.protocol, fold=fold, allow_missing=FLAGS.allow_missing) for fold in range(NUM_FOLDS)
    ]


if __name__ == "__main__":
    run(main)
