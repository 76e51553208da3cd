"""Trains the lung model.

python experiments/train_lung.py --data_dir=DATA --workdir=runs/lung
"""

from common import processes, settings
from common.run import run

settings.define_recipe_flags()
settings.define_split_flags()
settings.define_initial_checkpoint_flag()
processes.define_device_flags()


def main() -> None:
    """Trains by the flags."""
    settings.train_from_flags("lung")


if __name__ == "__main__":
    run(main)
