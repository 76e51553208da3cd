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

from benchmarks.measure import Row, in_subprocess, interleave, load_torch_baseline, row
from benchmarks.training import FULL, NARROW
from resunet_jax.config import TaskName, override
from resunet_jax.data.phantom import PhantomConfig, make_phantom
from resunet_jax.data.preprocess import prepare_volume
from resunet_jax.data.readers import read_volume
from resunet_jax.inference.predictor import Predictor
from resunet_jax.inference.scan import segment_scan
from resunet_jax.model.build import build_model
from resunet_jax.model.resunet import init_variables
from resunet_jax.recipes import DEFAULT_RECIPE, recipe
from resunet_jax.weights.store import LoadedModel, save_model

SLICES = 300
LUNG_FRACTION = 0.84  # of the slices, as in the six real scans that this was developed with
_DRAWN = 60  # slices of the phantom; longer scans repeat them


def predict_suite(rounds: int) -> list[Row]:
    """Seconds a scan."""
    baseline = load_torch_baseline()
    with phantom_scan(_DRAWN) as scan, tempfile.TemporaryDirectory() as output:
        rows = []
        for filters, slices in ((NARROW, SLICES), (FULL, _DRAWN)):
            path = _with_slices(scan, slices)
            predictor = _make_predictor(path, filters)
            fields = {field.name: getattr(predictor, field.name) for field in dataclasses.fields(predictor)}
            jax_run = partial(segment_scan, path, Path(output), predictor)
            torch_run = (
                partial(segment_scan, path, Path(output), baseline.TorchPredictor(**fields)) if baseline else None
            )
            seconds = interleave(jax_run, torch_run, rounds, settle=False)
            name = f"cascade, {'-'.join(map(str, filters))}, 128², 512×512×{slices}, file to files"
            max_value = 10 if filters == NARROW else None
            rows.append(row("predict", name, "s", *seconds, max_value=max_value, max_ratio=0.6))
        return rows


def prediction_memory() -> list[Row]:
    """The most memory that a process holds which segments and reports a scan, for scans of two lengths."""
    rows = []
    with phantom_scan(_DRAWN) as scan, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        predictor = _make_predictor(scan, NARROW)
        for structure in predictor.structures:
            loaded: LoadedModel = getattr(predictor, structure)
            save_model(root / structure, loaded.variables, loaded.config)
        for slices in (SLICES, 4 * SLICES):
            code = (
                "from resunet_jax import find_sources, load_predictor, segment_scans\n"
                "from resunet_jax.report.outputs import make_outputs\n"
                f"predictor = load_predictor({str(root / 'lung')!r}, {str(root / 'infection')!r})\n"
                f"scans = find_sources({str(_with_slices(scan, slices))!r})\n"
                f"for result in segment_scans(scans, {str(root / 'masks')!r}, predictor, outputs=make_outputs()):\n"
                "    if result.error:\n"
                "        raise result.error\n"
            )
            _, _, peak = in_subprocess(code)
            name = f"cascade, report, {'-'.join(map(str, NARROW))}, 128², 512×512×{slices}: peak"
            rows.append(row("memory", name, "GB", [peak], max_value=2 if slices == SLICES else 1))
    return rows


def _make_predictor(scan: Path, filters: tuple[int, int, int, int]) -> Predictor:
    """Random weights, with a threshold for the lung that `LUNG_FRACTION` of the slices reach."""

    def loaded(task: TaskName, seed: int) -> LoadedModel:
        config = override(recipe(DEFAULT_RECIPE, task), {"model.filters": list(filters)})
        model = build_model(config)
        return LoadedModel(model, init_variables(model, jax.random.key(seed)), config)

    lung = loaded("lung", 0)
    images, _ = prepare_volume(read_volume(scan), lung.config.preprocess)
    sample = images[:: max(1, len(images) // 60)]
    highest = Predictor(lung, None).slice_probabilities(sample)["lung"].max(axis=(1, 2))
    threshold = float(np.quantile(highest, 1 - LUNG_FRACTION))
    return Predictor(lung, loaded("infection", 1), thresholds={"lung": threshold})


@contextlib.contextmanager
def phantom_scan(slices: int) -> Iterator[Path]:
    """A phantom of 512×512 pixels in Hounsfield units, as .nii.gz."""
    with tempfile.TemporaryDirectory(prefix="resunet-jax-benchmark-") as name:
        make_phantom(Path(name) / "set", PhantomConfig(volumes=2, slices=slices))
        plain = Path(name) / "set" / "ct_scans" / "coronacases_org_001.nii"
        image: Any = nib.load(plain)
        nib.save(image, Path(name) / "scan.nii.gz")
        yield Path(name) / "scan.nii.gz"


def _with_slices(scan: Path, slices: int) -> Path:
    """The scan with another number of slices, evenly chosen or repeated, in the same folder."""
    image: Any = nib.load(scan)
    values = np.asarray(image.dataobj)
    chosen = np.arange(slices) * values.shape[2] // slices
    path = scan.with_name(f"scan_{slices}.nii.gz")
    nib.save(nib.Nifti1Image(values[..., chosen], image.affine), path)
    return path
