"""Trains and tests lung and infection model on every fold of a protocol, beside the published numbers.

python experiments/cross_validate.py --data_dir=DATA --workdir=runs/folds --protocol=patient_five_fold
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.data.splits import FOLDED

FLAGS = flags.FLAGS
cli.define_recipe_flags()
flags.DEFINE_enum("protocol", "patient_five_fold", FOLDED, "How cases are shared out over the folds.")
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Cross-validates by the flags."""
    from resunet_jax.evaluation.cross_validation import cross_validate, print_cross_validation

    workdir = Path(FLAGS.workdir)
    results = cross_validate(
        cli.config_from_flags("lung"),
        cli.config_from_flags("infection"),
        Path(FLAGS.data_dir),
        workdir,
        cli.cache_dir(),
        protocol=FLAGS.protocol,
        allow_missing=FLAGS.allow_missing,
        should_stop=cli.stop_signals(),
    )
    print_cross_validation(results)
    print(f"report: {workdir.resolve()}")


if __name__ == "__main__":
    cli.run(main)
