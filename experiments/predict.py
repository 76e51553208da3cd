"""Segments scans: masks on each scan's own grid, numbers, and a page to look at.

python experiments/predict.py --input=SCAN --output_dir=out
"""

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from common import settings
from common.run import BAD_INPUT, run, with_flags

from resunet_jax.errors import InputError
from resunet_jax.files import check_output_dir

if TYPE_CHECKING:
    from resunet_jax.inference.batch import ScanResult

FLAGS = flags.FLAGS
_TERMINATED = 143  # the exit code of shells for SIGTERM
settings.define_path(
    "input",
    "A scan (NIfTI, NRRD or MetaImage file, DICOM folder, zip or multi-frame file), or a folder of scans.",
    required=True,
)
settings.define_path("output_dir", "Gets masks and reports; several processes may share it.", required=True)
settings.define_model_flags()
flags.DEFINE_string("series", None, "Of several DICOM series, only the one of this name or UID.")
flags.DEFINE_bool("probabilities", False, "Also writes the probabilities, as <scan>_lung_probability.nii.gz and so on.")
flags.DEFINE_bool(
    "uncertainty",
    False,
    "Also segments mirrored and shifted slices (test-time augmentation); writes <scan>_uncertainty.nii.gz.",
)
flags.DEFINE_bool(
    "report", True, "Writes <scan>_report.json, .html, _preview.png, a table of all scans; needs both models."
)
flags.DEFINE_bool("multilabel", False, "Also writes <scan>_labels.nii.gz: 1 left lung, 2 right lung, 3 infection.")
flags.DEFINE_bool("dicom_seg", False, "Also writes <scan>_seg.dcm; for DICOM, needs the extra dicom-seg.")
flags.DEFINE_float("consolidation_hu", -300.0, "From which HU infection counts as consolidation.")
settings.define_path("lobes", "Mask of the lobes by another tool, on the scan's grid: adds involvement by lobe.")
settings.define_assume_flag()
settings.define_compilation_cache_flag()


def main() -> None:
    """Segments by the flags; continues after a bad scan."""
    from resunet_jax.data.readers import find_sources
    from resunet_jax.inference.batch import segment_scans
    from resunet_jax.inference.predictor import load_predictor
    from resunet_jax.plugins import load_plugins
    from resunet_jax.report.outputs import make_outputs, write_cohort

    tables = load_plugins()
    source, output_dir = settings.path("input"), settings.path("output_dir")
    scans = find_sources(source, tables.readers, FLAGS.series)
    if output_dir.resolve() == source.resolve():
        raise InputError(f"--output_dir={output_dir} is the input folder; choose another, or masks would become scans")
    check_output_dir(output_dir)
    lobes = settings.optional_path("lobes")
    if lobes is not None and len(scans) != 1:
        raise InputError(
            f"--lobes={lobes} is of one scan, and {source} has {len(scans)}; give that scan, or its --series"
        )
    assumed = settings.assumption()
    predictor = load_predictor(**settings.model_arguments(), architectures=tables.architectures)
    _check_flags(predictor.structures)
    outputs = make_outputs(
        report=FLAGS.report and len(predictor.structures) == 2,
        multilabel=FLAGS.multilabel,
        dicom_seg=FLAGS.dicom_seg,
        consolidation_hu=FLAGS.consolidation_hu,
        lobes=lobes,
        readers=tables.readers,
    )
    results: list[ScanResult] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # by way of `finally`, as after Ctrl-C
    try:
        for result in segment_scans(
            scans,
            output_dir,
            predictor,
            save_probabilities=FLAGS.probabilities,
            uncertainty=FLAGS.uncertainty,
            readers=tables.readers,
            assumed=assumed,
            outputs=outputs,
        ):
            results.append(result)
            for file in (*result.masks, *result.others):
                print(file, *["(done before)"] * result.skipped, flush=True)
            if result.summary:
                print(f"{result.scan.name}: {result.summary}", flush=True)
    finally:  # interrupted, the table is of what is done
        failed = _conclude(results, len(scans))
        for file in write_cohort(output_dir) if results and "report" in outputs else ():
            print(file)
    if failed:
        sys.exit(BAD_INPUT)


def _check_flags(structures: "Sequence[str]") -> None:
    """Refuses flags that would decide nothing."""
    with_both = len(structures) == 2
    if FLAGS.uncertainty and "infection" not in structures:
        raise InputError("--uncertainty is of the infection; give --infection_checkpoint too, or leave it out")
    if FLAGS["report"].present and FLAGS.report and not with_both:
        raise InputError("--report is of lungs and infection; give both models, or leave it out")
    if FLAGS["consolidation_hu"].present and not (FLAGS.report and with_both):
        raise InputError("--consolidation_hu is of the report, which needs both models and --report; leave it out")


def _conclude(results: "Sequence[ScanResult]", scans: int) -> bool:
    """Prints what has become of the scans, and returns whether one has failed."""
    failures = [result for result in results if result.error]
    for failure in failures:
        print(f"error: {with_flags(str(failure.error))}", file=sys.stderr)
    if scans > 1:
        skipped = sum(result.skipped for result in results)
        print(
            f"{len(results) - len(failures)} of {scans} scans segmented{f', {skipped} of them before' * (skipped > 0)}"
        )
    return bool(failures)


if __name__ == "__main__":
    run(main)
