"""Comparing the masks of a large scan with their reference: all metrics of all structures."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import Row, in_subprocess, row
from resunet_jax.data.phantom import draw_scan

SHAPE = (512, 512, 300)
_DRAWN = 30  # slices of the phantom, which are repeated
_SHIFT = 3  # pixels by which the predicted masks lie beside the reference

_COMPARE = """
import time
import numpy as np
from resunet_jax.metrics import METRICS, Comparison
from resunet_jax.metrics.lung_sides import LEFT, RIGHT, split_lungs
labels, infection = (np.load(f"{folder}/{name}.npy") for name in ("lung", "infection"))
reference = {"lung": labels > 0, "infection": infection > 0, "left_lung": labels == LEFT, "right_lung": labels == RIGHT}
predicted = {name: np.roll(reference[name], shift, axis=1) for name in ("lung", "infection")}
del labels, infection
start = time.perf_counter()
predicted |= split_lungs(predicted["lung"], (0, predicted["lung"].shape[1] - 1))
for structure in reference:
    comparison = Comparison(structure, predicted, reference, (0.8, 0.8, 1.0), 0.00064, 1.0)
    values = {name: float(metric.value(comparison)) for name, metric in METRICS.items()}
    assert 0 < values["dice"] < 1 and values["hd95_mm"] > 0, values
print(time.perf_counter() - start)
"""


def evaluation_suite(rounds: int) -> list[Row]:
    """Seconds and gigabytes of one scan, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="resunet-jax-benchmark-") as folder:
        generator, repeated = np.random.default_rng(0), np.arange(SHAPE[2]) * _DRAWN // SHAPE[2]
        _, lung, infection = draw_scan(generator, generator, (*SHAPE[:2], _DRAWN), np.array([0.8, 0.8, 10.0]))
        for name, mask in (("lung", lung), ("infection", infection)):
            np.save(Path(folder) / f"{name}.npy", mask[..., repeated])
        runs = [in_subprocess(f"folder, shift = {folder!r}, {_SHIFT}\n{_COMPARE}") for _ in range(rounds)]
    name = f"all metrics of {'×'.join(map(str, SHAPE))}, 4 structures"
    masks_gb = 8 * np.prod(SHAPE) / 1e9  # predicted and reference, which are there in any case
    seconds, peaks = [float(printed) for printed, _, _ in runs], [peak - masks_gb for _, _, peak in runs]
    return [
        row("evaluate", name, "s", seconds, max_value=15),
        row("evaluate", f"{name}: peak besides their 8 masks", "GB", peaks, max_value=1),
    ]
