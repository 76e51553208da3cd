"""Calibration: whether a probability of 0.8 is right eight times out of ten."""

import dataclasses

import numpy as np
import numpy.typing as npt

BINS = 15
"""Bins of equal width, as in Guo et al., "On calibration of modern neural networks", 2017."""


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
        return Calibration(
            self.pixels + other.pixels,
            self.probability + other.probability,
            self.positive + other.positive,
            self.squared_error + other.squared_error,
        )

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
    bins = np.minimum((p * BINS).astype(np.int64), BINS - 1)
    return Calibration(
        np.bincount(bins, minlength=BINS).astype(np.float64),
        np.bincount(bins, weights=p, minlength=BINS).astype(np.float64),
        np.bincount(bins, weights=t, minlength=BINS).astype(np.float64),
        float(np.sum((p - t) ** 2)),
    )
