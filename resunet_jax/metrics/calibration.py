"""Calibration: whether a probability of 0.8 is right eight times out of ten, and the temperature that makes it so.

Temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017) divides logits by one number,
chosen on held-out patients. It keeps the order of probabilities, so that masks stay what they are.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize

BINS = 15
"""Bins of equal width, as in Guo et al., 2017."""

LOGIT_BINS = 1280
LOGIT_LIMIT = 16.0
"""Logits beyond it count as it: a float32 probability knows no higher ones."""
TEMPERATURES = (0.05, 20.0)
"""Between which `fit_temperature` looks."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Sums over pixels; those of several volumes add up with `+`.

    Attributes:
      pixels: (BINS,) how many probabilities fall into each bin.
      probability: (BINS,) their sum.
      positive: (BINS,) how many of the pixels belong to the structure.
      squared_error: sum of (probability - target)² over all pixels.
    """

    pixels: npt.NDArray[np.float64]
    probability: npt.NDArray[np.float64]
    positive: npt.NDArray[np.float64]
    squared_error: float

    def __add__(self, other: "Calibration") -> "Calibration":
        return Calibration(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    @property
    def brier(self) -> float:
        """Brier score: mean squared error of the probability, in [0, 1]; NaN without pixels."""
        total = self.pixels.sum()
        return float(self.squared_error / total) if total else float("nan")

    @property
    def ece(self) -> float:
        """Expected calibration error (ECE): |frequency - mean probability|, weighted by pixels, in [0, 1]."""
        total = self.pixels.sum()
        return float(np.abs(self.positive - self.probability).sum() / total) if total else float("nan")

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON.

        Returns:
          "ece", "brier" and "bins", a list of {"low", "high", "pixels", "mean_probability", "frequency"} without the
          empty ones.
        """
        edges = np.linspace(0, 1, BINS + 1)
        bins = [
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "pixels": int(n),
                "mean_probability": float(self.probability[i] / n),
                "frequency": float(self.positive[i] / n),
            }
            for i, n in enumerate(self.pixels)
            if n
        ]
        return {"ece": self.ece, "brier": self.brier, "bins": bins}


def calibration_sums(probability: npt.NDArray[np.float32], target: npt.NDArray[np.uint8]) -> Calibration:
    """The sums of one volume.

    Args:
      probability: any shape, in [0, 1].
      target: the same shape, 0 or 1.
    """
    p: npt.NDArray[np.float64] = np.asarray(probability, np.float64).ravel()
    t: npt.NDArray[np.float64] = np.asarray(target, np.float64).ravel()
    return _calibration(p, (None, p, t), float(np.sum((p - t) ** 2)))


def _calibration(
    p: npt.NDArray[np.float64], weights: Sequence[npt.NDArray[np.float64] | None], squared_error: float
) -> Calibration:
    """Sums of the weights by bin of the probability: of pixels (None counts them), probabilities and positives."""
    bins = np.minimum((p * BINS).astype(np.int64), BINS - 1)
    pixels, probability, positive = (np.bincount(bins, one, BINS).astype(np.float64) for one in weights)
    return Calibration(pixels, probability, positive, squared_error)


@dataclasses.dataclass(frozen=True)
class LogitHistogram:
    """Pixels by the logit of their probability: what a temperature is chosen on, in 20 kB whatever the volume.

    Those of several volumes add up with `+`.

    Attributes:
      counts: float64 (2, LOGIT_BINS), pixels outside and inside the structure, over bins of equal width from
        -LOGIT_LIMIT to LOGIT_LIMIT.
    """

    counts: npt.NDArray[np.float64]

    def __add__(self, other: "LogitHistogram") -> "LogitHistogram":
        return LogitHistogram(self.counts + other.counts)

    @property
    def has_both(self) -> bool:
        """Whether pixels lie inside and outside the structure."""
        return bool(self.counts.any(axis=1).all())

    def nll(self, temperature: float) -> float:
        """Mean negative log-likelihood of the targets, in nats, after logits are divided by the temperature."""
        scaled = _CENTRES / temperature
        losses = np.logaddexp(0, scaled), np.logaddexp(0, -scaled)
        return float((self.counts * losses).sum() / self.counts.sum())

    def calibration(self, temperature: float = 1.0) -> Calibration:
        """Sums as of `calibration_sums` over probabilities of that temperature; ECE and Brier to about 0.001."""
        p, pixels = 1 / (1 + np.exp(-_CENTRES / temperature)), self.counts.sum(axis=0)
        squared_error = float((self.counts * (p**2, (1 - p) ** 2)).sum())
        return _calibration(p, (pixels, p * pixels, self.counts[1]), squared_error)


_CENTRES = (np.arange(LOGIT_BINS) + 0.5) * (2 * LOGIT_LIMIT / LOGIT_BINS) - LOGIT_LIMIT


def logit_histogram(probability: npt.NDArray[np.float32], target: npt.NDArray[np.uint8]) -> LogitHistogram:
    """The histogram of one volume.

    Args:
      probability: any shape, in [0, 1]. Pixels of probability 0, which postprocessing has removed or no model has seen,
        are left out: no temperature changes them.
      target: the same shape, 0 or 1.
    """
    is_open = probability > 0
    p = np.asarray(probability[is_open], np.float64)
    with np.errstate(divide="ignore"):  # at probability 1
        logits = np.clip(np.log(p) - np.log1p(-p), -LOGIT_LIMIT, LOGIT_LIMIT)
    bins = np.minimum(((logits + LOGIT_LIMIT) * (LOGIT_BINS / (2 * LOGIT_LIMIT))).astype(np.int64), LOGIT_BINS - 1)
    inside = np.asarray(target)[is_open] > 0
    counts = [np.bincount(bins[of], minlength=LOGIT_BINS) for of in (~inside, inside)]
    return LogitHistogram(np.stack(counts).astype(np.float64))


def fit_temperature(patients: Sequence[LogitHistogram]) -> float:
    """The median over patients of the temperature of least negative log-likelihood, in `TEMPERATURES`.

    Pooled pixels would be those of the most infected patients, and a patient whose infection is mostly missed wants a
    temperature of 7: one such patient must not decide for the others.

    Args:
      patients: a histogram for each, of predictions by models that have not seen the patient; those without pixels
        inside and outside the structure have no temperature, and are left out.

    Raises:
      ValueError: no patient has both.
    """
    known = [_least_nll(patient) for patient in patients if patient.has_both]
    if not known:
        raise ValueError("expected a patient with pixels inside and outside the structure, found none")
    return float(np.median(known))


def _least_nll(patient: LogitHistogram) -> float:
    low, high = (math.log(bound) for bound in TEMPERATURES)
    # Convex in the inverse of the temperature, so there is one minimum, in its logarithm too.
    return math.exp(
        optimize.minimize_scalar(lambda x: patient.nll(math.exp(x)), bounds=(low, high), method="bounded").x
    )


def apply_temperature(probability: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """Probabilities whose logits are divided by the temperature.

    Args:
      probability: any shape, in [0, 1]; 0, 0.5 and 1 stay what they are.
      temperature: above 0; above 1 draws probabilities towards 0.5.

    Returns:
      float32, the same shape.

    Example:
      >>> import numpy as np
      >>> apply_temperature(np.float32([0, 0.1, 0.5, 0.9]), temperature=2.0).round(2).tolist()
      [0.0, 0.25, 0.5, 0.75]
    """
    p = np.asarray(probability, np.float64)
    larger = np.maximum(p, 1 - p)  # whose power would be 0, too, for a low temperature
    inside, outside = (p / larger) ** (1 / temperature), ((1 - p) / larger) ** (1 / temperature)
    return (inside / (inside + outside)).astype(np.float32)
