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
flags.adopt_module_key_flags(settings)  # so that --help shows them


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
    for fact in check.cases:
        infected = "–" if fact.infected_slices is None else fact.infected_slices
        air = "" if fact.air_hu is None else f", air {fact.air_hu:.0f} HU"
        codes = "sform {} qform {}, ".format(*fact.codes) if fact.codes else ""
        lung = "–" if fact.lung_hu is None else f"{fact.lung_hu:.0f} HU"
        print(
            f"{fact.case}: {'×'.join(map(str, fact.shape))} {fact.axes}, {codes}"
            f"{' × '.join(f'{mm:.3g}' for mm in fact.spacing_mm)} mm, "
            f"{fact.intensity_scale} {fact.low:g}..{fact.high:g}"
            f"{air}, lung {fact.lung_labels} {lung}, infection {fact.infection_labels}, "
            f"infected slices {infected} of {fact.slices}"
        )
    for finding in check.findings:
        print(f"{finding.severity}: {finding.text}")
    slices = sum(fact.slices for fact in check.cases)
    infected_slices = sum(fact.infected_slices or 0 for fact in check.cases)
    patients = len({fact.patient for fact in check.cases})
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
