"""One evaluation from checkpoints and data folder to numbers."""

from pathlib import Path

from resunet_jax.data.cases import find_cases, require_infection_masks
from resunet_jax.data.prepared import prepare_cases
from resunet_jax.data.splits import read_split
from resunet_jax.errors import InputError
from resunet_jax.evaluation.evaluate import Evaluation, evaluate_cases
from resunet_jax.files import check_output_dir
from resunet_jax.inference.segment import load_segmenter
from resunet_jax.progress import logger


def evaluate(
    data_dir: Path,
    cache_dir: Path,
    *,
    output_dir: Path,
    lung_checkpoint: Path | None = None,
    infection_checkpoint: Path | None = None,
    part: str = "test",
    split_file: Path | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Evaluates one or both models of the cascade on a part of a split.

    Args:
      data_dir: see `find_cases`.
      cache_dir: see `prepare_cases`.
      output_dir: where the report will go; checked before the work begins.
      lung_checkpoint: see `load_segmenter`.
      infection_checkpoint: see `load_segmenter`.
      part: "train", "val", "test", or "all" for every case of the data folder.
      split_file: see `read_split`; by default the split that the models were trained on.
      batch_size: slices at a time.

    Raises:
      InputError: models, data or split are not fit for it.
    """
    check_output_dir(output_dir)
    segmenter = load_segmenter(lung_checkpoint, infection_checkpoint, batch_size)
    cases = find_cases(data_dir)
    if part != "all":
        own = [path / "split.json" for path in (infection_checkpoint, lung_checkpoint) if path is not None]
        files = [split_file] if split_file else [path for path in own if path.is_file()]
        if not files:
            raise InputError(f"which cases are the {part} part? Give --split_file, or --split=all")
        splits = [read_split(file, cases) for file in files]
        if any(split != splits[0] for split in splits):
            logger.warning("%s and %s differ: a case may have trained one of the models; using the first", *files)
        cases = splits[0].cases(part, cases)
    if segmenter.infection is not None:
        require_infection_masks(cases)
    return evaluate_cases(segmenter, prepare_cases(cases, segmenter.preprocess, cache_dir))
