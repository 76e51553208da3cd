"""From one number a volume to what a paper reports."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""


def describe(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Mean, SD, median and the mean's 95 % interval of one metric.

    Args:
      values: one a volume; NaN where undefined, which is left out and counted.
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
    """The 95 % percentile interval of the mean, drawing patients, not volumes, with replacement.

    All volumes of a patient are drawn together: two scans of one person do not make two people.

    Args:
      values: finite, one a volume.
      patients: whose volume each is.
      seed: the same seed gives the same interval.

    Returns:
      (low, high); NaN with fewer than two patients, of whose spread nothing is known.
    """
    names, patient_of = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    sums = np.bincount(patient_of, weights=np.asarray(values, float))
    counts = np.bincount(patient_of)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)
