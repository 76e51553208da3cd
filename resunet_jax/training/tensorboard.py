"""For TensorBoard, what metrics.jsonl and figures/ hold; by tensorboardX, the extra `tensorboard`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir
from resunet_jax.training.loop import ignore_epoch

FOLDER = "tensorboard"
"""Folder of a workdir, for `tensorboard --logdir`."""


@contextlib.contextmanager
def tensorboard_writer(workdir: Path, *, wanted: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function for `train`'s `on_epoch` that writes each record's numbers; at the end come the pictures of figures/.

    The folder is written anew, as metrics.jsonl is, and not before the first record: a training that is refused leaves
    nothing. Without `wanted` the function does nothing.

    Raises:
      InputError: tensorboardX is not installed, or the folder cannot be written.
    """
    if not wanted:
        yield ignore_epoch
        return
    try:
        from tensorboardX import SummaryWriter  # noqa: PLC0415
    except ImportError as error:
        raise InputError('`tensorboard` needs tensorboardX: pip install "resunet-jax[tensorboard]"') from error
    folder = workdir / FOLDER
    writers: list[Any] = []  # none or one

    def on_epoch(record: dict[str, Any]) -> None:
        if not writers:
            make_output_dir(folder)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            writers.append(SummaryWriter(str(folder)))
        for name, value in record.items():
            if value is not None:
                writers[0].add_scalar(name, value, record["epoch"])
        writers[0].flush()

    try:
        yield on_epoch
    finally:
        for writer in writers:
            for path in sorted((workdir / "figures").glob("*.png")):
                with Image.open(path) as picture:
                    writer.add_image(path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC")
            writer.close()
