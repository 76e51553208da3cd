"""Trains the lung model.

python experiments/train_lung.py --data_dir=DATA --workdir=runs/lung
"""

from pathlib import Path

import cli
from absl import flags

FLAGS = flags.FLAGS
cli.define_recipe_flags()
cli.define_split_flags()
cli.define_device_flags()
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Trains by the flags."""
    from resunet_jax.training.run import train

    devices, should_stop = cli.connect()
    train(
        cli.config_from_flags("lung"),
        Path(FLAGS.data_dir),
        Path(FLAGS.workdir),
        cli.cache_dir(),
        split=cli.split_request(),
        devices=devices,
        should_stop=should_stop,
    )


if __name__ == "__main__":
    cli.run(main)
