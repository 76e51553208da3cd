"""Segments scans: lung and infection masks on each scan's own grid.

python experiments/predict.py --input=SCAN.nii.gz --output_dir=masks --lung_checkpoint=runs/lung \
        --infection_checkpoint=runs/infection
"""

import sys
from pathlib import Path

import cli
from absl import flags

from resunet_jax.errors import InputError
from resunet_jax.files import check_output_dir

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "A scan (.nii, .nii.gz), or a folder of scans.", required=True)
flags.DEFINE_string("output_dir", None, "Gets <scan>_lung.nii.gz and <scan>_infection.nii.gz.", required=True)
cli.path_flag("lung_checkpoint", "Lung model: a training workdir (its best checkpoint) or an exported model.")
cli.path_flag("infection_checkpoint", "Infection model, the same.")
flags.DEFINE_bool("probabilities", False, "Also writes the probabilities, as <scan>_lung_probability.nii.gz and so on.")
cli.define_mask_flags()
cli.define_compilation_cache_flag()
flags.DEFINE_integer("batch_size", 8, "Slices at a time; it does not change the result.", lower_bound=1)
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Segments by the flags; goes on after a bad scan."""
    from resunet_jax.inference.folder import find_scans, segment_scans
    from resunet_jax.inference.segment import load_segmenter

    source, output_dir = Path(FLAGS.input), Path(FLAGS.output_dir)
    scans = find_scans(source)
    if output_dir.resolve() == source.resolve():
        raise InputError(f"--output_dir={output_dir} is the input folder; choose another, or masks would become scans")
    check_output_dir(output_dir)
    segmenter = load_segmenter(
        cli.to_path(FLAGS["lung_checkpoint"]),
        cli.to_path(FLAGS["infection_checkpoint"]),
        FLAGS.batch_size,
        validated_threshold=FLAGS.threshold == "validated",
        smallest_region=FLAGS.smallest_region,
    )
    outcomes = []
    for outcome in segment_scans(scans, output_dir, segmenter, save_probabilities=FLAGS.probabilities):
        outcomes.append(outcome)
        for mask in outcome.masks:
            print(mask, *["(done before)"] * outcome.done_before, flush=True)
    failures = [outcome for outcome in outcomes if outcome.error]
    for failure in failures:
        print(f"error: {failure.error}", file=sys.stderr)
    if len(scans) > 1:
        before = sum(outcome.done_before for outcome in outcomes)
        print(
            f"{len(scans) - len(failures)} of {len(scans)} scans segmented{f', {before} of them before' * (before > 0)}"
        )
    if failures:
        sys.exit(2)


if __name__ == "__main__":
    cli.run(main)
