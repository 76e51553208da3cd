"""Checks a data set: one line per scan, one per finding with its remedy; exit code 1 where training cannot start.

python experiments/check_data.py --data_dir=DATA
"""

import json
import sys

from absl import flags
from common import settings
from common.run import run

from resunet_jax.data.cases import KNOWN_CASES
from resunet_jax.data.validate import DataCheck, check_data

FLAGS = flags.FLAGS
settings.define_data_flags()
flags.DEFINE_bool("json", False, "Prints JSON instead: {cases, findings, missing, is_complete, can_train}.")


def main() -> None:
    """Checks by the flags."""
    from resunet_jax.plugins import load_plugins

    check = check_data(settings.path("data_dir"), load_plugins().readers, assumed=settings.assumption())
    if FLAGS.json:
        print(json.dumps(check.to_dict(), indent=2))
    else:
        _print(check)
    if not check.can_train:
        sys.exit(1)


def _print(check: DataCheck) -> None:
    for summary in check.cases:
        infected = "–" if summary.infected_slices is None else summary.infected_slices
        air = "" if summary.air_hu is None else f", air {summary.air_hu:.0f} HU"
        codes = "sform {} qform {}, ".format(*summary.codes) if summary.codes else ""
        lung = "–" if summary.lung_hu is None else f"{summary.lung_hu:.0f} HU"
        print(
            f"{summary.case}: {'×'.join(map(str, summary.shape))} {summary.axes}, {codes}"
            f"{' × '.join(f'{mm:.3g}' for mm in summary.spacing_mm)} mm, "
            f"{summary.intensity_scale} {summary.low:g}..{summary.high:g}"
            f"{air}, lung {summary.lung_labels} {lung}, infection {summary.infection_labels}, "
            f"infected slices {infected} of {summary.slices}"
        )
    for finding in check.findings:
        print(f"{finding.severity}: {finding.text}")
    slices = sum(summary.slices for summary in check.cases)
    infected_slices = sum(summary.infected_slices or 0 for summary in check.cases)
    patients = len({summary.patient for summary in check.cases})
    print(f"{len(check.cases)} scans of {patients} patients, {slices:,} slices, {infected_slices:,} with infection")
    if check.is_complete:
        print("the full set of 20 is there")
    elif check.missing:
        print(
            f"of the full set's {len(KNOWN_CASES)} cases {len(check.missing)} are missing: {', '.join(check.missing)}"
        )
    errors = sum(finding.severity == "error" for finding in check.findings)
    print("training can start" if check.can_train else f"training cannot start: {errors} error(s)")


if __name__ == "__main__":
    run(main)
