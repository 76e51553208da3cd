"""Makes a synthetic chest-CT set in the Kaggle layout.

python experiments/make_phantom.py --output_dir=phantom --seed=0
"""

import dataclasses

from absl import flags
from common import settings
from common.run import run

from resunet_jax.data.phantom import SMALL, PhantomConfig, make_phantom

FLAGS = flags.FLAGS
settings.define_path("output_dir", "New folder.", required=True)
flags.DEFINE_integer("seed", 0, "The same seed gives the same files.", lower_bound=0)
flags.DEFINE_bool("small", False, "Few and small scans, in seconds.")
flags.DEFINE_integer("volumes", None, "Number of scans, 2 to 100, by default 10 (--small: 6); half of each source.")
flags.DEFINE_integer("downsample", None, "Divides the in-plane size of 512 or 630 pixels.", lower_bound=1)


def main() -> None:
    """Makes the set by the flags."""
    config = dataclasses.replace(SMALL if FLAGS.small else PhantomConfig(), seed=FLAGS.seed)
    if FLAGS.downsample is not None:
        config = dataclasses.replace(config, downsample=FLAGS.downsample)
    if FLAGS.volumes is not None:
        config = dataclasses.replace(config, volumes=FLAGS.volumes)
    make_phantom(settings.path("output_dir"), config)
    print(f"{config.volumes} scans: {settings.path('output_dir').resolve()}")


if __name__ == "__main__":
    run(main)
