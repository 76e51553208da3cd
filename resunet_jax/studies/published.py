"""Published results on the same data set, to compare with."""

from typing import NamedTuple


class Published(NamedTuple):
    """One published result.

    Attributes:
      source: authors and method.
      protocol: how the cases were split.
      structure: as in `STRUCTURES`.
      dice: mean over volumes, in [0, 1].
      nsd: surface Dice at 1 mm (lungs) or 3 mm (infection), in [0, 1]; None where not reported.
      same_cases: whether it was measured on the 20 volumes of Kaggle's and Zenodo's set.
      remark: what else keeps it from being compared, or "".
    """

    source: str
    protocol: str
    structure: str
    dice: float
    nsd: float | None
    same_cases: bool
    remark: str = ""

    def remarks(self, protocol: str, full_set: bool) -> str:
        """What keeps it from being compared with a study by `protocol`; "" where nothing does."""
        data = [] if self.same_cases and full_set else ["different data"]
        others = [] if self.protocol == protocol else ["different protocol"]
        return "; ".join([*data, *others, *filter(None, [self.remark])])


_MA = "Ma et al. 2021, nnU-Net"
_UNION = "reported as union"
_SOFT = "soft, mean over batches of 4 slices: not a Dice of volumes"

PUBLISHED = (
    Published(f"{_MA} 2-D", "few_shot", "left_lung", 0.951, 0.846, True),
    Published(f"{_MA} 2-D", "few_shot", "right_lung", 0.956, 0.855, True),
    Published(f"{_MA} 2-D", "few_shot", "infection", 0.609, 0.615, True),
    Published(f"{_MA} 3-D", "few_shot", "left_lung", 0.858, 0.712, True),
    Published(f"{_MA} 3-D", "few_shot", "right_lung", 0.879, 0.748, True),
    Published(f"{_MA} 3-D", "few_shot", "infection", 0.673, 0.700, True),
    Published(f"{_MA} 3-D", "five_fold", "left_lung", 0.911, 0.794, True, _UNION),
    Published(f"{_MA} 3-D", "five_fold", "right_lung", 0.922, 0.792, True, _UNION),
    Published(f"{_MA} 3-D", "five_fold", "infection", 0.777, 0.808, True),
    Published("covid19.MIScnn 3-D", "five-fold of its own", "lung", 0.956, None, True),
    Published("covid19.MIScnn 3-D", "five-fold of its own", "infection", 0.761, None, True),
    Published("LungQuant, two U-Nets", "external test", "lung", 0.95, None, False),
    Published("LungQuant, two U-Nets", "external test", "infection", 0.66, None, False),
    Published("three readers (Bartoli et al. 2022)", "agreement", "infection", 0.70, None, False),
    Published("original project 2-D", "original", "lung", 0.7385, None, True, _SOFT),
    Published("original project 2-D", "original", "infection", 0.4708, None, True, _SOFT),
)
"""Sources: Ma et al., Medical Physics 48(3), 2021; Müller et al. (MIScnn), 2020; Lizzi et al. (LungQuant), 2021."""
