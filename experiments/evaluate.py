"""Evaluates the cascade, or one of its models, per volume on the native grid.

python experiments/evaluate.py --data_dir=DATA --lung_checkpoint=runs/lung --infection_checkpoint=runs/infection \
        --split=test --output_dir=runs/evaluation
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.evaluation.metrics import TOLERANCE_MM

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of the data set, in Kaggle's or Zenodo's layout.", required=True)
flags.DEFINE_string("output_dir", None, "Gets metrics.json, volumes.csv, slices.csv and pictures.", required=True)
cli.path_flag("lung_checkpoint", "Lung model: a training workdir (its best checkpoint) or an exported model.")
cli.path_flag("infection_checkpoint", "Infection model, the same.")
flags.DEFINE_enum("split", "test", ["train", "val", "test", "all"], "Which part of the split to evaluate.")
cli.path_flag("split_file", "The split; by default the one in the workdir of the models.")
flags.DEFINE_integer("batch_size", 8, "Slices at a time; it does not change the result.", lower_bound=1)
cli.define_mask_flags()
for structure, default in TOLERANCE_MM.items():
    flags.DEFINE_float(f"{structure}_tolerance_mm", default, f"Of the surface Dice of the {structure}, in mm.")
cli.define_cache_flag()
cli.define_compilation_cache_flag()
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Evaluates by the flags."""
    from resunet_jax.evaluation.report import print_table, write_report
    from resunet_jax.evaluation.run import evaluate

    output_dir = Path(FLAGS.output_dir)
    evaluation = evaluate(
        Path(FLAGS.data_dir),
        cli.cache_dir(),
        lung_checkpoint=cli.to_path(FLAGS["lung_checkpoint"]),
        infection_checkpoint=cli.to_path(FLAGS["infection_checkpoint"]),
        part=FLAGS.split,
        split_file=cli.to_path(FLAGS["split_file"]),
        batch_size=FLAGS.batch_size,
        output_dir=output_dir,
        validated_threshold=FLAGS.threshold == "validated",
        smallest_region=FLAGS.smallest_region,
        tolerance_mm={structure: FLAGS[f"{structure}_tolerance_mm"].value for structure in TOLERANCE_MM},
    )
    write_report(evaluation, output_dir)
    print_table(evaluation)
    print(f"report: {output_dir.resolve()}")


if __name__ == "__main__":
    cli.run(main)
