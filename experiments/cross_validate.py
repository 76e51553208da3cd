"""Trains and tests lung and infection model on every fold of a protocol, next to published results.

python experiments/cross_validate.py --data_dir=DATA --workdir=runs/folds --protocol=patient_five_fold

Started several times at once with the same --workdir, the processes share the folds.
"""

from absl import flags
from common import settings
from common.run import run

from resunet_jax.data.splits import FOLD_PROTOCOLS

FLAGS = flags.FLAGS
settings.define_recipe_flags()
settings.define_initial_pair_flags()
flags.DEFINE_enum("protocol", "patient_five_fold", FOLD_PROTOCOLS, "How cases are split into folds.")


def main() -> None:
    """Cross-validates by the flags."""
    from resunet_jax.config import Config, override
    from resunet_jax.studies.runner import cross_validate
    from resunet_jax.studies.table import print_cross_validation
    from resunet_jax.studies.variants import Variant

    study, changes = settings.study(), settings.changes_from_flags()
    results = cross_validate(
        study,
        Variant(FLAGS.recipe, FLAGS.recipe),
        protocol=FLAGS.protocol,
        changes=changes,
        seed=override(Config(), changes).train.seed,
        allow_missing=FLAGS.allow_missing,
    )
    print_cross_validation(results)
    print(f"report: {study.workdir.resolve()}")


if __name__ == "__main__":
    run(main)
