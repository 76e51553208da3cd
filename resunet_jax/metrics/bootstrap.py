"""From one number per volume to the statistics that a paper reports."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""


def summary_statistics(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Mean, SD, median and the mean's 95 % CI of one metric.

    Args:
      values: one per volume; NaN where undefined, which is left out and counted.
      patients: whose volume each is.
      seed: of the bootstrap.

    Returns:
      "mean", "sd" (n - 1 below), "median", "ci_low", "ci_high" (see `bootstrap_interval`), "volumes", "undefined".
    """
    is_defined = ~np.isnan(np.asarray(values, float))
    defined = np.asarray(values, float)[is_defined]
    low, high = bootstrap_interval(defined, np.asarray(patients)[is_defined].tolist(), seed)
    return {
        "mean": float(defined.mean()) if len(defined) else float("nan"),
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 else float("nan"),
        "median": float(np.median(defined)) if len(defined) else float("nan"),
        "ci_low": low,
        "ci_high": high,
        "volumes": len(values),
        "undefined": len(values) - len(defined),
    }


def bootstrap_interval(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % CI of the mean: percentile bootstrap that draws patients, not volumes, with replacement.

    All volumes of a patient are drawn together: two scans of one person do not make two people.

    Args:
      values: finite, one per volume.
      patients: whose volume each is.
      seed: the same seed gives the same interval.

    Returns:
      (low, high); NaN with fewer than two patients, of whose spread nothing is known.
    """
    if len(set(patients)) < 2:
        return float("nan"), float("nan")
    return seed_patient_interval(np.asarray(values, float)[None], patients, seed)


def seed_patient_interval(
    values: npt.NDArray[np.floating[Any]], patients: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """95 % CI of the mean: two-level cluster bootstrap that draws training seeds and patients, each with replacement.

    Args:
      values: (seeds, volumes), finite; of one seed, or one patient, the interval is over the other alone.
      patients: whose volume each is; all volumes of a patient are drawn together.
      seed: of the bootstrap; the same gives the same interval.

    Returns:
      (low, high); NaN where there is one seed and one patient, of whose spread nothing is known.
    """
    names, patient_of = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if values.size == 0 or (len(values) < 2 and len(names) < 2):
        return float("nan"), float("nan")
    sums = np.stack([np.bincount(patient_of, weights=row) for row in values])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(RESAMPLES, len(names)))
    totals = np.bincount(patient_of)[drawn].sum(axis=1)
    seeds = rng.integers(len(values), size=(RESAMPLES, len(values)))
    chosen = sums[seeds[:, :, None], drawn[:, None, :]].sum(axis=2)  # (resamples, seeds)
    low, high = np.percentile(chosen.mean(axis=1) / totals, (2.5, 97.5))
    return float(low), float(high)
