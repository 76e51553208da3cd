"""One evaluation from checkpoints and data folder to numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resunet_jax.data.cases import Case, find_cases, require_infection_masks
from resunet_jax.data.readers import READERS, Reader
from resunet_jax.data.slice_cache import MAX_CACHE_GB, prepare_cases
from resunet_jax.data.splits import read_split
from resunet_jax.errors import InputError
from resunet_jax.evaluation.compare import Evaluation, evaluate_cases
from resunet_jax.files import check_output_dir, expand_user
from resunet_jax.inference.predictor import load_predictor
from resunet_jax.metrics import METRICS, Metric
from resunet_jax.metrics.overlap import TOLERANCE_MM
from resunet_jax.model.build import ARCHITECTURES, Architecture
from resunet_jax.progress import logger


def evaluate(
    data_dir: str | Path,
    cache_dir: str | Path,
    *,
    output_dir: str | Path,
    lung_checkpoint: str | Path | None = None,
    infection_checkpoint: str | Path | None = None,
    subset: str = "test",
    split_file: str | Path | None = None,
    batch_size: int = 8,
    thresholds: Mapping[str, float] | None = None,
    validated_threshold: bool = False,
    min_component_fraction: float | None = None,
    infection_postprocess: Mapping[str, Any] | None = None,
    tolerance_mm: Mapping[str, float] = TOLERANCE_MM,
    uncertainty: bool = False,
    metrics: Mapping[str, Metric] = METRICS,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
    readers: Mapping[str, Reader] = READERS,
    assumed: tuple[float, float] | None = None,
    max_cache_gb: float = MAX_CACHE_GB,
) -> Evaluation:
    """Evaluates one or both models of the cascade on a subset of a split.

    Args:
      data_dir: see `find_cases`.
      cache_dir: see `prepare_cases`.
      output_dir: where the report will go; checked before the work begins.
      lung_checkpoint: see `load_predictor`.
      infection_checkpoint: see `load_predictor`.
      subset: "train", "val", "test", or "all" for every case of the data folder.
      split_file: see `read_split`; by default the split that the models were trained on.
      batch_size: slices at a time.
      thresholds: see `load_predictor`.
      validated_threshold: see `load_predictor`.
      min_component_fraction: see `load_predictor`.
      infection_postprocess: see `load_predictor`.
      tolerance_mm: see `evaluate_cases`.
      uncertainty: see `evaluate_cases`.
      metrics: the table of metrics.
      architectures: the table of models.
      readers: the table of formats.
      assumed: what the scans' values are, see `open_scan`; by default inferred for each.
      max_cache_gb: see `prepare_cases`.

    Raises:
      InputError: models, data or split are not fit for it.
    """
    check_output_dir(expand_user(output_dir))
    if subset == "all" and split_file:
        raise InputError("`split_file`: its subsets are not asked for by `subset=all`; drop one of the two")
    for structure, value in tolerance_mm.items():
        if not 0 < value < math.inf:
            raise InputError(f"`{structure}_tolerance_mm={value:g}`: it must be a finite number above 0 mm")
    predictor = load_predictor(
        lung_checkpoint,
        infection_checkpoint,
        batch_size,
        thresholds=thresholds,
        validated_threshold=validated_threshold,
        min_component_fraction=min_component_fraction,
        infection_postprocess=infection_postprocess,
        architectures=architectures,
    )
    if uncertainty and predictor.infection is None:
        raise InputError("`uncertainty` is of the infection; give `infection_checkpoint` too, or leave it out")
    own = [expand_user(path) / "split.json" for path in (infection_checkpoint, lung_checkpoint) if path is not None]
    split_files = [expand_user(split_file)] if split_file else [file for file in own if file.is_file()]
    cases, protocol = _subset(find_cases(expand_user(data_dir), readers), subset, split_files)
    if predictor.infection is not None:
        require_infection_masks(cases)
    prepared = prepare_cases(
        cases, predictor.preprocess, expand_user(cache_dir), readers, assumed=assumed, max_cache_gb=max_cache_gb
    )
    return evaluate_cases(
        predictor,
        prepared,
        tolerance_mm=tolerance_mm,
        protocol=protocol,
        uncertainty=uncertainty,
        metrics=metrics,
        readers=readers,
    )


def _subset(cases: Sequence[Case], subset: str, files: Sequence[Path]) -> tuple[list[Case], str]:
    """The cases of a subset of the first of some split files, or all of them, and what that is in words."""
    if subset == "all":
        return list(cases), "all cases of the folder, whether a model has seen them or not"
    if not files:
        raise InputError(f"which cases are the {subset} subset? Give `split_file`, or `subset=all`")
    splits = [read_split(file, cases) for file in files]
    if not all(split.has_subsets_of(splits[0]) for split in splits):
        logger.warning("%s and %s differ: a case may have trained one of the models; using the first", *files)
    return splits[0].cases(subset, cases), f"{subset} subset of {splits[0].protocol or 'a split file'}"
