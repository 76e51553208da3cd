"""Conformal intervals: what a volume may be in truth, from the errors on held-out patients.

Errors are taken on a scale on which those of small and large volumes are alike (`Quantity`), one for each patient: the
largest of a patient's scans, which makes the interval wider, never too narrow.

- **Split conformal** (`split_interval`): residuals of the very model on patients left out of its training. A new
  patient is covered with probability `level` at least, whatever the model and the distribution. It is conformal risk
  control (Angelopoulos et al., ICLR 2024) for the loss "not covered".
- **CV+** (`cv_plus_interval`; Barber et al., "Predictive inference with the jackknife+", Annals of Statistics 49(1),
  2021): residuals of the models of a cross-validation, around *their* predictions of the new scan. Its guarantee is
  `cv_plus_guarantee`, near 1 − 2α for the level 1 − α.
- Residuals of a cross-validation around the prediction of a final model, which saw all of these patients, guarantee
  nothing: an estimate, good as far as the final model errs as those of the folds did.

All of it is true on average over patients who come as those of the calibration did (exchangeable). Another scanner,
protocol or population, another disease, or scans chosen because they are bad, break it, and no number here shows that.
It is a statement on average: it may hold less often for the heavily infected than for the others.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DEFAULT_LEVEL = 0.9
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A non-negative number; its errors are taken on the scale of its square root.

    So an error of 10 in 25 weighs as one of 20 in 100. On a logarithmic scale, errors where next to nothing is infected
    would make the intervals of all other patients wide; without a scale, those of the heavily infected would.

    Attributes:
      highest: that the value can be.
    """

    highest: float = math.inf

    def residual(self, predicted: float, reference: float) -> float:
        """The absolute error on the scale."""
        return abs(math.sqrt(reference) - math.sqrt(predicted))

    def between(self, low: float, high: float) -> tuple[float, float]:
        """From the scale back to values, cut to what they can be."""
        return min(self.highest, max(0.0, low) ** 2), min(self.highest, max(0.0, high) ** 2)


QUANTITIES = {"infection_ml": Quantity(), "involvement_percent": Quantity(highest=100.0)}
"""What gets an interval: the volume of the infection, and the infected fraction of the lungs."""


def achievable_level(patients: int) -> float:
    """The highest level that so many patients can promise with a bounded interval: n / (n + 1).

    Example:
      >>> round(achievable_level(5), 3), round(achievable_level(9), 3)
      (0.833, 0.9)
    """
    return patients / (patients + 1)


def default_level(patients: int) -> float:
    """`DEFAULT_LEVEL`, or what so many patients can promise where that is less."""
    return min(DEFAULT_LEVEL, achievable_level(patients))


def conformal_quantile(residuals: Sequence[float], level: float) -> float:
    """The ⌈level·(n + 1)⌉-th smallest of n residuals, for a level in (0, 1); infinite where there is none.

    Example:
      >>> conformal_quantile([3.0, 1.0, 2.0], level=0.75), conformal_quantile([3.0, 1.0, 2.0], level=0.8)
      (3.0, inf)
    """
    rank = math.ceil(level * (len(residuals) + 1) - _ROUNDING)
    return math.inf if rank > len(residuals) else sorted(residuals)[rank - 1]


def split_interval(
    predicted: float, residuals: Sequence[float], level: float, quantity: Quantity
) -> tuple[float, float]:
    """The split conformal interval around a prediction.

    Args:
      predicted: of the new scan, at least 0.
      residuals: `Quantity.residual` of each patient.
      level: in (0, 1); above `achievable_level` the interval is all that the value can be.
      quantity: what is predicted.

    Returns:
      (low, high), in the unit of the quantity.
    """
    centre, reach = math.sqrt(predicted), conformal_quantile(residuals, level)
    return quantity.between(centre - reach, centre + reach)


def cv_plus_interval(
    predicted: Sequence[float], residuals: Sequence[float], level: float, quantity: Quantity
) -> tuple[float, float]:
    """The CV+ interval of a new scan.

    Args:
      predicted: for each patient, of the new scan, by the model that has not seen this patient.
      residuals: for each patient, of that model on this patient.
      level: 1 − α; what is guaranteed is `cv_plus_guarantee`.
      quantity: what is predicted.

    Returns:
      (low, high), in the unit of the quantity.

    Raises:
      ValueError: not one prediction for each residual.
    """
    if len(predicted) != len(residuals):
        raise ValueError(f"expected a prediction for each of {len(residuals)} residuals, found {len(predicted)}")
    centres = [math.sqrt(value) for value in predicted]
    high = conformal_quantile([c + r for c, r in zip(centres, residuals, strict=True)], level)
    low = -conformal_quantile([r - c for c, r in zip(centres, residuals, strict=True)], level)
    return quantity.between(low, high)


def is_covered(interval: tuple[float, float], value: float) -> bool:
    """Whether an interval holds a value, but for rounding: the end of one is often a value that it was made from."""
    low, high = interval
    slack = _ROUNDING * abs(value)
    return low - slack <= value <= high + slack


def cv_plus_guarantee(level: float, patients: int, folds: int) -> float:
    """How often a CV+ interval covers at least (Barber et al., 2021, theorem 4): 1 − 2α, less where folds hold several.

    The theorem is for folds of equal size.

    Args:
      level: 1 − α.
      patients: of all folds.
      folds: into which the patients were divided.

    Example:
      >>> round(cv_plus_guarantee(5 / 6, patients=5, folds=5), 3)
      0.667
    """
    slack = min(2 * (1 - 1 / folds) / (patients / folds + 1), (1 - folds / patients) / (folds + 1))
    return max(0.0, 1 - 2 * (1 - level) - slack)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of them is constant or there are fewer than three pairs."""
    from scipy import stats  # noqa: PLC0415 - 0.4 s to import, which predictions need not wait

    first, second = stats.rankdata(a), stats.rankdata(b)
    if len(first) < 3 or not np.ptp(first) or not np.ptp(second):
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def worst_third_found(score: Sequence[float], quality: Sequence[float]) -> float:
    """What share of the third of lowest quality is in the third of lowest score.

    Failure detection as Zenk et al., "Comparative benchmarking of failure detection methods in medical image
    segmentation", Medical Image Analysis 101, 2025, evaluate it: does a score, known without a reference, name the
    scans whose masks are bad? A third of n scans are ⌈n / 3⌉ of them, and by chance ⌈n / 3⌉ / n of these are found.

    Args:
      score: of each scan, low where the masks are doubtful.
      quality: of each scan, as its Dice.
    """
    count = math.ceil(len(score) / 3)
    return float(_lowest(quality, count) @ _lowest(score, count)) / count if count else math.nan


def _lowest(values: Sequence[float], count: int) -> npt.NDArray[np.float64]:
    """How much each belongs to the `count` lowest, in [0, 1]; equal ones share the places left."""
    array: npt.NDArray[np.float64] = np.asarray(values, float)
    lower, equal = (compare.outer(array, array).sum(axis=1) for compare in (np.greater, np.equal))
    return np.clip((count - lower) / equal, 0.0, 1.0)
