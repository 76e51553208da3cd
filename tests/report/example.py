"""A report as `report/numbers.py` makes it, with hostile names, and a small scan."""

import io
from typing import Any

import numpy as np

from resunet_jax.report.slices import EncodedSlice, encode_slices

SIZE_MM = (0.8, 0.8, 5.0)
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'\u2028"


def part(percent: float | None, lung_ml: float = 2000.0, infection_ml: float = 300.0) -> dict[str, Any]:
    grade = None if percent is None else 2
    return {"percent": percent, "grade": grade, "lung_ml": lung_ml, "infection_ml": infection_ml}


def example_report(name: str = "scan_1", slices: int = 12, **changes: Any) -> dict[str, Any]:
    report = {
        "schema_version": 1,
        "scan": {
            "name": name,
            "file": f"{name}.nii.gz",
            "format": "nifti",
            "shape": [512, 512, slices],
            "spacing_mm": list(SIZE_MM),
            "slices": slices,
        },
        "lung": {"volume_ml": 4321.0, "left_ml": 2000.0, "right_ml": None},
        "infection": {
            "volume_ml": 543.2,
            "involvement_percent": 12.57,
            "ground_glass_ml": 443.2,
            "consolidation_ml": 100.0,
            "consolidation_above_hu": -300.0,
            "mean_hu": -412.0,
            "lesions": 3,
            "lesion_volumes_ml": [500.0, 40.0, 3.2],
        },
        "involvement": {
            "both": part(12.5, 4000.0, 600.0),
            "left": part(15.0),
            "right": part(10.9),
            "upper": part(None),
            "middle": part(14.0),
            "lower": part(20.5),
        },
        "grade": 2,
        "by_slice": {"lung_ml": [300.0] * slices, "infection_ml": [float(k % 7) for k in range(slices)]},
        "lobes": None,
        "warnings": [],
        "notes": ["A note.", "Left and right follow the header of the scan."],
        "models": {"infection": {"folder": "runs/infection", "epoch": 30}},
        "settings": {"threshold": 0.5, "seed": None},
        "version": "0.9.0",
        "seconds": 12.3,
        "disclaimer": "as the page has it",
        "unknown": {"key": 1},
    }
    return {**report, **changes}


def example_arrays(rows: int = 120, columns: int = 150, slices: int = 12) -> dict[str, Any]:
    """A noisy body with two lungs and a lesion in one; as keywords of `encode`."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    hu = np.where((x / 0.9) ** 2 + (y / 0.8) ** 2 < 1, 40.0, -1000.0)[..., None] + rng.normal(
        0, 20, (rows, columns, slices)
    )
    lung = np.zeros(hu.shape, np.uint8)
    lung[((np.abs(x) - 0.45) / 0.3) ** 2 + (y / 0.6) ** 2 < 1] = 2
    lung[(lung[..., 0] > 0) & (x > 0)] = 1
    hu[lung > 0] -= 880
    infection = np.zeros(hu.shape, bool)
    infection[((x + 0.5) / 0.1) ** 2 + (y / 0.3) ** 2 < 1] = True
    hu[infection] += 400
    return {"hu": hu.astype(np.float32), "lung": lung, "infection": infection}


def encode(**arrays: Any) -> list[EncodedSlice]:
    """`encode_slices`, kept in memory."""
    return encode_slices(**arrays, file=io.BytesIO())


def example_slices(**size: int) -> list[EncodedSlice]:
    return encode(**example_arrays(**size))
