"""Evaluates the cascade, or one of its models, per volume on the native grid.

python experiments/evaluate.py --data_dir=DATA --lung_checkpoint=runs/lung --infection_checkpoint=runs/infection \
        --split=test --output_dir=runs/evaluation
"""

from absl import flags
from common import settings
from common.run import run

from resunet_jax.errors import InputError
from resunet_jax.metrics.overlap import TOLERANCE_MM

FLAGS = flags.FLAGS
settings.define_data_flags()
settings.define_path("output_dir", "Gets metrics.json, volumes.csv, slices.csv and figures.", required=True)
settings.define_model_flags()
flags.DEFINE_enum("split", "test", ["train", "val", "test", "all"], "Which subset of the split to evaluate.")
settings.define_path("split_file", "The split; by default the one in the workdir of the models.")
flags.DEFINE_bool(
    "uncertainty",
    False,
    "Also segments mirrored and shifted slices, and reports whether their agreement predicts Dice.",
)
for structure, default in TOLERANCE_MM.items():
    flags.DEFINE_float(f"{structure}_tolerance_mm", default, f"Of the surface Dice of the {structure}, in mm.")
settings.define_cache_flags()


def main() -> None:
    """Evaluates by the flags."""
    from resunet_jax.evaluation.evaluate import evaluate
    from resunet_jax.evaluation.report import print_table, write_report
    from resunet_jax.plugins import load_plugins

    output_dir = settings.path("output_dir")
    given = {structure: FLAGS[f"{structure}_checkpoint"].value for structure in TOLERANCE_MM}
    for structure in TOLERANCE_MM:
        if FLAGS[f"{structure}_tolerance_mm"].present and any(given.values()) and not given[structure]:
            raise InputError(f"--{structure}_tolerance_mm: give --{structure}_checkpoint too, or leave it out")
    evaluation = evaluate(
        settings.path("data_dir"),
        settings.path("cache_dir"),
        subset=FLAGS.split,
        split_file=settings.optional_path("split_file"),
        output_dir=output_dir,
        tolerance_mm={structure: getattr(FLAGS, f"{structure}_tolerance_mm") for structure in TOLERANCE_MM},
        uncertainty=FLAGS.uncertainty,
        assumed=settings.assumption(),
        max_cache_gb=FLAGS.max_cache_gb,
        **settings.model_arguments(),
        **load_plugins().for_evaluation,
    )
    write_report(evaluation, output_dir)
    print_table(evaluation)
    print(f"report: {output_dir.resolve()}")


if __name__ == "__main__":
    run(main)
