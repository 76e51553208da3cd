"""Converts a checkpoint of the original PyTorch project to a model folder, or a model back to such a file.

python experiments/convert_torch.py --task=lung --input=unet_lung.pt --output_dir=models/lung
python experiments/convert_torch.py --input=models/lung --output_file=unet_lung.pt
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.config import PreprocessConfig
from resunet_jax.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "PyTorch file; or, with --output_file, a model folder or workdir.", required=True)
flags.DEFINE_enum("task", None, ["lung", "infection"], "What the PyTorch model segments.")
cli.path_flag("output_dir", "New folder for evaluate.py and predict.py.")
cli.path_flag("output_file", "New PyTorch file for the original project.")
flags.DEFINE_integer(
    "image_size", PreprocessConfig().image_size, "Side of the slices the PyTorch model was trained on, in pixels."
)
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Converts by the flags."""
    from resunet_jax.training.torch_checkpoint import from_torch, to_torch

    source = Path(FLAGS.input)
    output_dir, output_file = cli.to_path(FLAGS["output_dir"]), cli.to_path(FLAGS["output_file"])
    if (output_dir is None) == (output_file is None):
        raise InputError("give --output_dir to convert from PyTorch, or --output_file to convert to it")
    if output_file is not None:
        to_torch(source, output_file)
        print(f"PyTorch checkpoint: {output_file.resolve()}")
    elif output_dir is not None:
        if FLAGS.task is None:
            raise InputError("what does the model segment? Give --task=lung or --task=infection")
        config = from_torch(source, output_dir, FLAGS.task, FLAGS.image_size)
        print(f"{config.task} model, filters {','.join(map(str, config.model.filters))}: {output_dir.resolve()}")


if __name__ == "__main__":
    cli.run(main)
