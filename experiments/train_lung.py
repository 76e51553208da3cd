"""Trains the lung model.

python experiments/train_lung.py --data_dir=DATA --workdir=runs/lung
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.training.run import train

FLAGS = flags.FLAGS
cli.define_training_flags()
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Trains by the flags."""
    train(
        cli.config_from_flags("lung"),
        Path(FLAGS.data_dir),
        Path(FLAGS.workdir),
        cli.cache_dir(),
        split_file=cli.to_path(FLAGS["split_file"]),
        split_seed=FLAGS.split_seed,
    )


if __name__ == "__main__":
    cli.run(main)
