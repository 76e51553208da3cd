"""Trains the infection model on [CT, lung probability], or on CT alone.

python experiments/train_infection.py --data_dir=DATA --workdir=runs/infection --lung_checkpoint=runs/lung
"""

from absl import flags
from common import processes, settings
from common.run import run

from resunet_jax.errors import InputError

FLAGS = flags.FLAGS
settings.define_recipe_flags()
settings.define_split_flags()
settings.define_initial_checkpoint_flag()
processes.define_device_flags()
settings.define_path("lung_checkpoint", "Lung model: a training workdir (its best checkpoint) or a saved model.")
flags.DEFINE_bool("ct_only", False, "Train on CT alone, without a lung model.")


def main() -> None:
    """Trains by the flags."""
    if FLAGS.ct_only and FLAGS.lung_checkpoint:
        raise InputError("--ct_only and --lung_checkpoint exclude each other; drop one of them")
    if not FLAGS.ct_only and not FLAGS.lung_checkpoint:
        raise InputError(
            "infection training needs the lung model: give its workdir with --lung_checkpoint, or --ct_only"
        )
    settings.train_from_flags(
        "infection_ct" if FLAGS.ct_only else "infection", settings.optional_path("lung_checkpoint")
    )


if __name__ == "__main__":
    run(main)
