"""What the values of a scan mean: Hounsfield units, a window in 0..255, or nothing that a model could use.

The scale is inferred from three levels that every chest CT shows: air around the patient, lung inside the body, soft
tissue. On the Hounsfield scale they are near -1000, between -950 and -500, and near 40. A scan whose levels lie
elsewhere is refused, with what was found and what to do: it would give a wrong mask without a word.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from resunet_jax.data.volume import HU_WINDOW, IntensityScale, Volume
from resunet_jax.errors import InputError

AIR_HU = (-1100.0, -950.0)
"""Where air around the patient may lie in a scan in Hounsfield units; it is not moved."""
DARKEST_HU = (-1100.0, -720.0)
"""Where the darkest of air and lung may lie in it, if air and lung cannot be told apart (a cropped field of view)."""
TISSUE_HU = (-200.0, 200.0)
"""Where soft tissue may lie in it, from a patient who is mostly fat to contrast agent."""
AIR_LEVEL = (17.0, 70.0)
"""Where air may lie in a scan in 0..255, which is moved to -1000 HU: within about 150 HU of a window from -1250."""
TISSUE_LEVEL = (165.0, 248.0)
"""Where soft tissue may lie in it."""
TISSUE_ABOVE_AIR = (138.0, 205.0)
"""By how many levels soft tissue may lie above air: windows of about 1,300 to 1,800 HU."""
LUNG_LEVEL = (45.0, 140.0)
"""Where lung may lie in it, if no air can be seen."""
LUNG_FRACTION = (0.06, 0.6)
"""Where lung may lie between air (0) and soft tissue (1) in a scan in 0..255."""

MUSCLE_HU = 45.0
"""Where muscle and blood lie; `rescaled_window` puts them there, and air at -1000."""
ACCEPTED_AIR: dict[IntensityScale, tuple[float, float]] = {"hu": (-1015.0, -985.0), "windowed": (34.0, 70.0)}
"""Where air lies in scans that are left as they are, in HU or as a level of 0..255; there `air_offset` shifts it to
-1000 HU, once the body's box is found."""
ACCEPTED_MUSCLE_HU: dict[IntensityScale, tuple[float, float]] = {"hu": (5.0, 130.0), "windowed": (-5.0, 65.0)}
"""Where muscle, or an organ with contrast agent, lies in scans that are left as they are, air being at -1000 HU."""
ACCEPTED_FAT_HU: dict[IntensityScale, tuple[float, float]] = {"hu": (-125.0, -62.0), "windowed": (-135.0, -50.0)}
"""The same of fat, where it can be told from muscle: it takes up no contrast agent, so it tells a slope that is off."""
FAT_HU = -60.0
"""Below it, the brightest tissue may be the fat of a scan that shows no muscle: it is left as it is, with a warning."""

SAMPLED_SLICES = 16
"""Of a scan, evenly spread, that are looked at."""

_SIDE = 128  # pixels of a slice that are looked at, along each side
_MIN_DISTINCT = 32  # values; label maps have fewer
_MIN_VISIBLE = 0.005  # of the voxels: a level that fewer show is not used
_PADDING_BELOW = -1100.0  # values beyond the field of view, in HU
INSIDE_FIELD = 0.2
"""Of the voxels around the body; fewer above 0 are the table and clothes, and air itself is at 0."""
_PROMINENT = 0.5  # of the highest peak: fat and muscle are both so high, vessels with contrast agent are not
_FAT_PROMINENT = 0.2  # of the highest peak, below muscle: thin patients have little fat
_FAT_BELOW_MUSCLE = (0.1, 0.3)  # of the way from muscle to air, about 100 to 300 HU
_NEAR_AIR = 0.06  # of the way from air to soft tissue, about 60 HU
_CUT_BINS = 8  # below the largest value, where values that a window cuts off pile up
_CLIPPED = 0.45  # of the bright voxels at the largest value: soft tissue is cut off


class Landmarks(NamedTuple):
    """Levels of which it is known where they lie in HU, in the units of the file.

    Attributes:
      air: median of what is around the body and near its most frequent value.
      muscle: of what is bright the brightest frequent value, for the most frequent one may be fat.
      fat: the frequent value next below it, by 100 HU or more; None where none is seen, as in thin patients and noisy
        scans.
    """

    air: float
    muscle: float
    fat: float | None


class Levels(NamedTuple):
    """Levels of a scan in the units of its file; None where too few voxels show one.

    Attributes:
      air: most frequent value around the body.
      lung: median of what is dark inside the body.
      tissue: most frequent value of what is bright.
      distinct: how many different values there are.
      clipped: whether most of what is bright has the largest value.
      landmarks: see `Landmarks`; None where air or what is bright cannot be seen.
    """

    air: float | None
    lung: float | None
    tissue: float | None
    distinct: int
    clipped: bool
    landmarks: Landmarks | None = None

    def __str__(self) -> str:
        found = {"air": self.air, "lung": self.lung, "soft tissue": self.tissue}
        return ", ".join(f"{name} " + ("not seen" if x is None else f"at {x:.0f}") for name, x in found.items())


def sees_air(levels: Levels) -> bool:
    """Whether the level around the body is that of air: in a cropped field of view, lung reaches the border.

    It is taken for air where no lung can be seen inside the body.
    """
    air, lung, tissue = levels.air, levels.lung, levels.tissue
    if air is None or tissue is None:
        return False
    return lung is None or lung - air > LUNG_FRACTION[0] * (tissue - air)


def measure_levels(volume: Volume) -> Levels:
    """The levels of a scan, from up to 16 of its slices."""
    values = volume.sample_slices(SAMPLED_SLICES).values
    step = max(1, min(values.shape[:2]) // _SIDE)
    values = values[::step, ::step].astype(np.float32)
    low = values.min()
    valid = values > low if low < _PADDING_BELOW else np.ones(values.shape, bool)
    if not valid.any():
        return Levels(None, None, None, 1, clipped=False)
    threshold = _otsu(values[valid])
    bright = (values > threshold) & valid
    dark = valid & ~bright
    around = np.stack([_touches_border(~bright[..., k]) for k in range(values.shape[-1])], axis=-1)
    outside, high = values[dark & around], values[bright].max(initial=low)
    if low >= 0 and np.count_nonzero(outside) > INSIDE_FIELD * outside.size:
        outside = outside[outside > 0]  # 0 is beyond the field of view
    tissue = values[bright & (values < high)] if (values[bright] == high).mean() < _CLIPPED else values[bright]
    bin_width = float(np.ptp(values[valid])) / 250
    uncut = tissue[tissue < high - _CUT_BINS * bin_width]
    least = _MIN_VISIBLE * values.size

    def mode(some: npt.NDArray[np.float32]) -> float | None:
        if some.size <= least:
            return None
        smooth, centres = _smooth_histogram(some, bin_width)
        return float(centres[smooth.argmax()])

    inside, air, soft = values[dark & ~around], mode(outside), mode(tissue)
    return Levels(
        air,
        float(np.median(inside)) if inside.size > least else None,
        soft,
        len(np.unique(values)),
        clipped=bool((values[bright] == high).mean() >= _CLIPPED),
        landmarks=_landmarks(outside, uncut, air, soft),
    )


def _otsu(values: npt.NDArray[np.float32]) -> float:
    """The threshold that parts dark from bright with the largest variance between them (Otsu, 1979)."""
    low, high = np.percentile(values, (0.5, 99.5))
    counts, edges = np.histogram(np.clip(values, low, high), 256)
    centres = (edges[1:] + edges[:-1]) / 2
    weight, moment = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    rest, rest_moment = counts.sum() - weight, (counts * centres).sum() - moment
    between = weight * rest * (moment / np.maximum(weight, 1) - rest_moment / np.maximum(rest, 1)) ** 2
    return float(centres[int(np.argmax(between))])


def _touches_border(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The components of a slice that reach its border."""
    labels, _ = ndimage.label(mask)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, edge[edge > 0])


def _landmarks(
    outside: npt.NDArray[np.float32], tissue: npt.NDArray[np.float32], air: float | None, soft: float | None
) -> Landmarks | None:
    """Air from what is around the body, muscle and fat from what is bright, smoothed by about 20 HU."""
    if air is None or soft is None or soft <= air or not tissue.size:
        return None
    near_air = outside[np.abs(outside - air) < _NEAR_AIR * (soft - air)]  # the rest is lung, the table, clothes
    smooth, centres = _smooth_histogram(tissue, (soft - air) / 200, 4.0)
    padded = np.pad(smooth, 1)
    peaks = (smooth >= padded[:-2]) & (smooth > padded[2:])
    muscle = float(centres[peaks & (smooth >= _PROMINENT * smooth.max())][-1])
    below = (muscle - centres) / (muscle - air)
    is_fat = peaks & (smooth >= _FAT_PROMINENT * smooth.max())
    is_fat &= (below > _FAT_BELOW_MUSCLE[0]) & (below < _FAT_BELOW_MUSCLE[1])
    return Landmarks(float(np.median(near_air)), muscle, float(centres[is_fat][-1]) if is_fat.any() else None)


def _smooth_histogram(
    values: npt.NDArray[np.float32], bin_width: float, sigma: float = 2.0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Counts of values, smoothed over a few bins, and the bins' centres."""
    low, high = float(values.min()), float(values.max())
    if high - low <= bin_width:
        return np.ones(1), np.array([float(np.median(values))])
    counts, edges = np.histogram(values, int(np.ceil((high - low) / bin_width)))
    smooth: npt.NDArray[np.float64] = ndimage.gaussian_filter1d(counts.astype(float), sigma, mode="constant")
    return smooth, (edges[1:] + edges[:-1]) / 2


def muscle_hu(levels: Levels, scale: IntensityScale) -> float | None:
    """Where muscle lies on a scan's scale when air is put at -1000 HU; None where either of them cannot be seen."""
    if levels.landmarks is None or not sees_air(levels):
        return None
    return _hu(levels.landmarks.muscle, levels.landmarks, scale)


def _hu(level: float, landmarks: Landmarks, scale: IntensityScale) -> float:
    """A level on a scan's scale when air is put at -1000 HU."""
    return (level - landmarks.air) * (1.0 if scale == "hu" else (HU_WINDOW[1] - HU_WINDOW[0]) / 255) - 1000


def rescaled_window(levels: Levels, scale: IntensityScale) -> tuple[float, float] | None:
    """The stored values that HU -1250 and 250 are, where air, muscle or fat lie off the scale that a scan is on.

    A slope or window that is a little off changes what ground glass looks like; where these lie is known.

    Returns:
      the values; None for a scan that is left as it is: an accepted one, or one whose air or muscle cannot be seen.
    """
    landmarks, found = levels.landmarks, muscle_hu(levels, scale)
    if landmarks is None or found is None or found < FAT_HU:
        return None
    air, muscle, fat = landmarks
    is_accepted = _within(air, ACCEPTED_AIR[scale]) and _within(found, ACCEPTED_MUSCLE_HU[scale])
    if is_accepted and (fat is None or _within(_hu(fat, landmarks, scale), ACCEPTED_FAT_HU[scale])):
        return None
    slope = (muscle - air) / (MUSCLE_HU + 1000)
    low, high = (air + slope * (hu + 1000) for hu in HU_WINDOW)
    return low, high


def parse_assumption(text: str) -> tuple[float, float]:
    """What a user who knows better says of a scan's values: "hu", or "window:LOW,HIGH" in HU for values in 0..255.

    Returns:
      the stored values that HU -1250 and 250 are.

    Raises:
      InputError: it is neither.
    """
    kind, _, numbers = text.partition(":")
    if text == "hu":
        return HU_WINDOW
    try:
        low, high = (float(number) for number in numbers.split(","))
    except ValueError:
        low, high = np.nan, np.nan
    if kind != "window" or not low < high or not np.isfinite(high - low):
        raise InputError(f"`assumed={text}`: it must be hu, or window:LOW,HIGH in HU, as in window:-1250,250")
    first, second = (255 * (hu - low) / (high - low) for hu in HU_WINDOW)
    return first, second


def infer_scale(
    path: Path, levels: Levels, value_range: tuple[float, float], *, physical: bool = True
) -> IntensityScale:
    """The intensity scale of a scan that can be used.

    Args:
      path: of the scan, for messages.
      levels: of the scan.
      value_range: smallest and largest value of all voxels.
      physical: False for models that scale each slice by its own range, for which any scale will do that shows a chest.

    Raises:
      InputError: the values are no CT of a chest, or on no scale that is known.
    """
    low, high = value_range
    if levels.distinct < _MIN_DISTINCT:
        raise InputError(f"{path}: only {levels.distinct} values, {low:g} to {high:g}, as in a label map; give the CT")
    if not physical:
        _require_chest(path, levels)
        return "windowed" if low >= 0 and high <= 255 else "hu"
    if low <= -200:
        _require_hu(path, levels)
        return "hu"
    if low >= 0 and 1 < high <= 255:
        _require_window(path, levels)
        return "windowed"
    raise InputError(
        f"{path}: values in [{low:g}, {high:g}] are neither Hounsfield units (air near -1000) nor 0..255 over "
        f"HU [-1250, 250]; {_REMEDY}"
    )


_REMEDY = (
    "export the scan in Hounsfield units (the header's slope and intercept applied), or say what its values are with "
    "`assumed`"
)


def _require_hu(path: Path, levels: Levels) -> None:
    air, lung, tissue = levels.air, levels.lung, levels.tissue
    dark = [level for level in (air, lung) if level is not None]
    good = tissue is not None and _within(tissue, TISSUE_HU)
    if not (good and dark and _within(min(dark), AIR_HU if lung is not None and sees_air(levels) else DARKEST_HU)):
        raise InputError(
            f"{path}: not a chest CT in Hounsfield units: {levels}, where air is at -1000, lung near -850 and soft "
            f"tissue near 40; {_REMEDY}"
        )


def _within(level: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= level <= bounds[1]


def _require_chest(path: Path, levels: Levels) -> None:
    air, lung, tissue = levels.air, levels.lung, levels.tissue
    good = tissue is not None and lung is not None
    if air is not None and lung is not None and tissue is not None:
        good = _within((lung - air) / (tissue - air), LUNG_FRACTION)
    if not good:
        raise InputError(f"{path}: no lungs in it: {levels}, and lung lies between the other two; give a chest CT")


def _require_window(path: Path, levels: Levels) -> None:
    air, lung, tissue = levels.air, levels.lung, levels.tissue
    good = tissue is not None and lung is not None and not levels.clipped and _within(tissue, TISSUE_LEVEL)
    if air is not None and lung is not None and tissue is not None and sees_air(levels):
        good = good and _within(air, AIR_LEVEL) and _within(tissue - air, TISSUE_ABOVE_AIR)
        good = good and _within((lung - air) / (tissue - air), LUNG_FRACTION)
    else:
        good = good and lung is not None and _within(min(lung, lung if air is None else air), LUNG_LEVEL)
    if not good:
        raise InputError(
            f"{path}: 0..255, but not over HU [-1250, 250] or a window near it: {levels}, where air is near 42, lung "
            f"near 68 and soft tissue near 219; {_REMEDY}, as in `assumed=window:-1000,400`"
        )
