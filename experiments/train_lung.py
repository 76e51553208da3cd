"""Trains the lung model.

python experiments/train_lung.py --data_dir=DATA --workdir=runs/lung
"""

from absl import flags
from common import processes, settings
from common.run import run, stop_signals

settings.define_recipe_flags()
settings.define_split_flags()
processes.define_device_flags()
flags.adopt_module_key_flags(settings)  # so that --help shows them
flags.adopt_module_key_flags(processes)


def main() -> None:
    """Trains by the flags."""
    config = settings.config_from_flags("lung")

    from resunet_jax.plugins import load_plugins
    from resunet_jax.training.train import train

    devices = processes.init_distributed()
    with settings.epoch_writer() as on_epoch:
        train(
            config,
            devices=devices,
            should_stop=stop_signals(),
            on_epoch=on_epoch,
            **settings.training_arguments(),
            **load_plugins().for_training,
        )


if __name__ == "__main__":
    run(main)
