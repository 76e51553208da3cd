"""Converts a checkpoint of the original PyTorch project to a model folder, or a model back to such a file.

python experiments/convert_torch.py --task=lung --input=unet_lung.pt --output_dir=models/lung
python experiments/convert_torch.py --input=models/lung --output_file=unet_lung.pt
"""

from absl import flags
from common import settings
from common.run import run

from resunet_jax.config import PreprocessConfig
from resunet_jax.errors import InputError

FLAGS = flags.FLAGS
settings.define_path("input", "PyTorch file; or, with --output_file, a saved model or workdir.", required=True)
flags.DEFINE_enum("task", None, ["lung", "infection"], "What the PyTorch model segments.")
settings.define_path("output_dir", "New folder for evaluate.py and predict.py.")
settings.define_path("output_file", "New PyTorch file for the original project.")
flags.DEFINE_integer(
    "image_size", PreprocessConfig().image_size, "Side of the slices the PyTorch model was trained on, in pixels."
)


def main() -> None:
    """Converts by the flags."""
    from resunet_jax.weights.store import load_model_for
    from resunet_jax.weights.torch import from_torch, to_torch

    source = settings.path("input")
    output_dir, output_file = settings.optional_path("output_dir"), settings.optional_path("output_file")
    if (output_dir is None) == (output_file is None):
        raise InputError("give --output_dir to convert from PyTorch, or --output_file to convert to it")
    if output_file is not None:
        if FLAGS["image_size"].present:
            raise InputError("--image_size is of a model from PyTorch; leave it out, ours knows its own")
        if FLAGS.task is not None:
            load_model_for(source, FLAGS.task)  # refuses a model of another structure
        to_torch(source, output_file)
        print(f"PyTorch checkpoint: {output_file.resolve()}")
    elif output_dir is not None:
        if FLAGS.task is None:
            raise InputError("what does the model segment? Give --task=lung or --task=infection")
        config = from_torch(source, output_dir, FLAGS.task, FLAGS.image_size)
        print(f"{config.task} model, filters {','.join(map(str, config.model.filters))}: {output_dir.resolve()}")


if __name__ == "__main__":
    run(main)
