"""Trains the infection model on [CT, lung probability], or on CT alone.

python experiments/train_infection.py --data_dir=DATA --workdir=runs/infection --lung_checkpoint=runs/lung
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.errors import InputError

FLAGS = flags.FLAGS
cli.define_recipe_flags()
cli.define_split_flags()
cli.define_device_flags()
cli.path_flag("lung_checkpoint", "Lung model: a training workdir (its best checkpoint) or an exported model.")
flags.DEFINE_bool("ct_only", False, "Train on CT alone, without a lung model.")
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Trains by the flags."""
    from resunet_jax.training.run import train

    if FLAGS.ct_only and FLAGS.lung_checkpoint:
        raise InputError("--ct_only and --lung_checkpoint exclude each other; drop one of them")
    devices, should_stop = cli.connect()
    train(
        cli.config_from_flags("infection_ct" if FLAGS.ct_only else "infection"),
        Path(FLAGS.data_dir),
        Path(FLAGS.workdir),
        cli.cache_dir(),
        split=cli.split_request(),
        devices=devices,
        should_stop=should_stop,
        lung_checkpoint=cli.to_path(FLAGS["lung_checkpoint"]),
    )


if __name__ == "__main__":
    cli.run(main)
