"""Segments scans: lung and infection masks on each scan's own grid.

python experiments/predict.py --input=SCAN.nii.gz --output_dir=masks --lung_checkpoint=runs/lung \
        --infection_checkpoint=runs/infection
"""

import sys

from absl import flags
from common import settings
from common.run import BAD_INPUT, run

from resunet_jax.errors import InputError
from resunet_jax.files import check_output_dir

FLAGS = flags.FLAGS
settings.define_path("input", "A scan (.nii, .nii.gz), or a folder of scans.", required=True)
settings.define_path("output_dir", "Gets <scan>_lung.nii.gz and <scan>_infection.nii.gz.", required=True)
settings.define_model_flags()
flags.DEFINE_bool("probabilities", False, "Also writes the probabilities, as <scan>_lung_probability.nii.gz and so on.")
flags.DEFINE_string("assume", None, "What the values are: hu, or window:LOW,HIGH in HU for 0..255; by default judged.")
settings.define_compilation_cache_flag()
flags.adopt_module_key_flags(settings)  # so that --help shows them


def main() -> None:
    """Segments by the flags; continues after a bad scan."""
    from resunet_jax.data.intensity import parse_assumption
    from resunet_jax.data.readers import find_sources
    from resunet_jax.inference.batch import segment_scans
    from resunet_jax.inference.predictor import load_predictor
    from resunet_jax.plugins import load_plugins

    tables = load_plugins()
    source, output_dir = settings.path("input"), settings.path("output_dir")
    scans = find_sources(source, tables.readers)
    if output_dir.resolve() == source.resolve():
        raise InputError(f"--output_dir={output_dir} is the input folder; choose another, or masks would become scans")
    check_output_dir(output_dir)
    predictor = load_predictor(**settings.model_arguments(), architectures=tables.architectures)
    results = []
    assumed = parse_assumption(FLAGS.assume) if FLAGS.assume else None
    for result in segment_scans(
        scans,
        output_dir,
        predictor,
        save_probabilities=FLAGS.probabilities,
        readers=tables.readers,
        assumed=assumed,
    ):
        results.append(result)
        for mask in result.masks:
            print(mask, *["(done before)"] * result.skipped, flush=True)
    failures = [result for result in results if result.error]
    for failure in failures:
        print(f"error: {failure.error}", file=sys.stderr)
    if len(scans) > 1:
        skipped = sum(result.skipped for result in results)
        print(
            f"{len(scans) - len(failures)} of {len(scans)} scans segmented"
            f"{f', {skipped} of them before' * (skipped > 0)}"
        )
    if failures:
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    run(main)
