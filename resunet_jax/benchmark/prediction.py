"""The cascade over a whole scan, file to files, against PyTorch doing both models on all slices; and its memory."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np

from resunet_jax.benchmark.measure import Row, alternate, in_subprocess, load_rival, row
from resunet_jax.benchmark.training import FULL, NARROW
from resunet_jax.config import TaskName, override
from resunet_jax.data.phantom import PhantomConfig, make_phantom
from resunet_jax.data.prepared import prepare_volume
from resunet_jax.data.volumes import read_volume
from resunet_jax.inference.segment import Segmenter, segment_scan
from resunet_jax.model.resunet import init_variables
from resunet_jax.recipes import DEFAULT_RECIPE, recipe
from resunet_jax.training.checkpoints import LoadedModel, save_model
from resunet_jax.training.tasks import build_model

SLICES = 300
LUNG_PART = 0.84  # of the slices, as in the six real scans that this was developed with
_DRAWN = 60  # slices of the phantom; longer scans repeat them


def predict_suite(rounds: int) -> list[Row]:
    """Seconds a scan."""
    rival = load_rival()
    with _scan(_DRAWN) as scan, tempfile.TemporaryDirectory() as output:
        rows = []
        for filters, slices in ((NARROW, SLICES), (FULL, _DRAWN)):
            path = _with_slices(scan, slices)
            segmenter = _make_segmenter(path, filters)
            fields = {field.name: getattr(segmenter, field.name) for field in dataclasses.fields(segmenter)}
            ours = partial(segment_scan, path, Path(output), segmenter)
            theirs = partial(segment_scan, path, Path(output), rival.TorchSegmenter(**fields)) if rival else None
            seconds = alternate(ours, theirs, rounds, settle=False)
            name = f"cascade, {'-'.join(map(str, filters))}, 128², 512×512×{slices}, file to files"
            most, ratio_most = (60, None) if filters == NARROW else (None, 0.6)
            rows.append(row("predict", name, "s", *seconds, most=most, ratio_most=ratio_most))
        return rows


def prediction_memory() -> list[Row]:
    """The most memory that a process holds which segments a scan, for scans of two lengths."""
    rows = []
    with _scan(_DRAWN) as scan, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        segmenter = _make_segmenter(scan, NARROW)
        for structure in segmenter.structures:
            loaded: LoadedModel = getattr(segmenter, structure)
            save_model(root / structure, loaded.variables, loaded.config)
        for slices in (SLICES, 4 * SLICES):
            code = (
                "from pathlib import Path\n"
                "from resunet_jax import load_segmenter, segment_scan\n"
                f"segmenter = load_segmenter({str(root / 'lung')!r}, {str(root / 'infection')!r})\n"
                f"segment_scan(Path({str(_with_slices(scan, slices))!r}), Path({str(root / 'masks')!r}), segmenter)\n"
            )
            _, _, peak = in_subprocess(code)
            name = f"cascade, {'-'.join(map(str, NARROW))}, 128², 512×512×{slices}: peak"
            rows.append(row("memory", name, "GB", [peak], most=2))
    return rows


def _make_segmenter(scan: Path, filters: tuple[int, int, int, int]) -> Segmenter:
    """Random weights, with a threshold for the lung that `LUNG_PART` of the slices reach."""

    def loaded(task: TaskName, seed: int) -> LoadedModel:
        config = override(recipe(DEFAULT_RECIPE, task), {"model.filters": list(filters)})
        model = build_model(config)
        return LoadedModel(model, init_variables(model, jax.random.key(seed)), config)

    lung = loaded("lung", 0)
    images, _ = prepare_volume(read_volume(scan), lung.config.preprocess)
    sample = images[:: max(1, len(images) // 60)]
    highest = Segmenter(lung, None).probabilities(sample)["lung"].max(axis=(1, 2))
    threshold = float(np.quantile(highest, 1 - LUNG_PART))
    return Segmenter(lung, loaded("infection", 1), thresholds={"lung": threshold})


@contextlib.contextmanager
def _scan(slices: int) -> Iterator[Path]:
    """A phantom of 512×512 pixels in Hounsfield units, as .nii.gz."""
    with tempfile.TemporaryDirectory(prefix="resunet-jax-benchmark-") as name:
        make_phantom(Path(name) / "set", PhantomConfig(volumes=2, slices=slices))
        plain = Path(name) / "set" / "ct_scans" / "coronacases_org_001.nii"
        image: Any = nib.load(plain)
        nib.save(image, Path(name) / "scan.nii.gz")
        yield Path(name) / "scan.nii.gz"


def _with_slices(scan: Path, slices: int) -> Path:
    """The scan with another number of slices, evenly chosen or repeated, beside it."""
    image: Any = nib.load(scan)
    values = np.asarray(image.dataobj)
    chosen = np.arange(slices) * values.shape[2] // slices
    path = scan.with_name(f"scan_{slices}.nii.gz")
    nib.save(nib.Nifti1Image(values[..., chosen], image.affine), path)
    return path
