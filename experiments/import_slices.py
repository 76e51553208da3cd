"""Makes a data set for pretraining of slices that have lost their Hounsfield units.

python experiments/import_slices.py --input=slices.npz --output_dir=SLICES
"""

from absl import flags
from common import settings
from common.run import run

from resunet_jax.data.grey_slices import import_grey_slices

FLAGS = flags.FLAGS
settings.define_path(
    "input", "File .npz of image (slices, rows, columns), lung and infection (the same) and case.", required=True
)
settings.define_path("output_dir", "New folder; its split.json has all cases in training.", required=True)
flags.DEFINE_list("flipped", [], "Cases whose rows run from back to front.")


def main() -> None:
    """Imports the slices by the flags."""
    folder = settings.path("output_dir")
    names = import_grey_slices(settings.path("input"), folder, FLAGS.flipped)
    print(f"{len(names)} cases, to be trained on with --assume=hu: {folder.resolve()}")


if __name__ == "__main__":
    run(main)
