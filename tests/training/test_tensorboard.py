"""TensorBoard's event file holds what metrics.jsonl and figures/ do, and is read back."""

import json
import os
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resunet_jax.config import Config
from resunet_jax.data.splits import SplitRequest
from resunet_jax.errors import StoppedError
from resunet_jax.training.tensorboard import FOLDER, tensorboard_writer
from resunet_jax.training.train import train
from tests.conftest import ROOT, TINY, Trained, run_script, training_flags


def read_events(folder: Path) -> tuple[dict[tuple[str, int], float], dict[str, bytes]]:
    """Numbers by name and epoch, each once, and pictures by name, of the one event file in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    content = path.read_bytes()
    numbers: dict[tuple[str, int], list[float]] = defaultdict(list)
    pictures, start = {}, 0
    while start < len(content):  # records of TFRecord: length, its checksum, data, its checksum
        (length,) = struct.unpack_from("<Q", content, start)
        event = Event.FromString(content[start + 12 : start + 12 + length])
        start += length + 16
        for value in event.summary.value:
            if value.HasField("image"):
                pictures[value.tag] = value.image.encoded_image_string
            else:
                numbers[value.tag, event.step].append(value.simple_value)
    return {key: one for key, (one,) in numbers.items()}, pictures


def check(workdir: Path) -> None:
    numbers, pictures = read_events(workdir / FOLDER)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = {(name, r["epoch"]): value for r in records for name, value in r.items() if value is not None}
    assert set(numbers) == set(expected)
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=1e-6), key
    assert set(pictures) == {path.stem for path in (workdir / "figures").glob("*.png")}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_a_training_that_was_stopped_and_resumed(trained: Trained, tmp_path: Path) -> None:
    config, split = Config(task="lung", **TINY), SplitRequest(trained.split_file)
    arguments = config, trained.data, tmp_path, trained.cache
    seen: list[int] = []
    with pytest.raises(StoppedError), tensorboard_writer(tmp_path) as on_epoch:
        train(*arguments, split=split, on_epoch=on_epoch, should_stop=lambda step: bool(on_disk(tmp_path)))
    check(tmp_path)
    with tensorboard_writer(tmp_path) as on_epoch:
        train(*arguments, split=split, on_epoch=lambda record: (seen.append(record["epoch"]), on_epoch(record)))
    assert seen == [1, 2]  # the first from before
    check(tmp_path)
    assert len(read_events(tmp_path / FOLDER)[1]) == 4


def on_disk(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def test_pictures_are_those_of_the_files(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    (tmp_path / "figures").mkdir()
    Image.fromarray(image).save(tmp_path / "figures" / "one.png")
    with tensorboard_writer(tmp_path) as on_epoch:
        on_epoch({"epoch": 1, "val_loss": None})
    (content,) = read_events(tmp_path / FOLDER)[1].values()
    (tmp_path / "again.png").write_bytes(content)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again.png")), image)


def test_nothing_is_written_before_the_first_epoch(tmp_path: Path) -> None:
    with tensorboard_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_flag_without_the_package(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["tensorboardX"] = None\n')
    flags = training_flags("lung", trained, tmp_path / "run", trained.cache, 2)
    result = run_script("train_lung", *flags, "--tensorboard", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert result.returncode == 2, result.stderr
    assert result.stderr == 'error: --tensorboard needs tensorboardX: pip install "resunet-jax[tensorboard]"\n'
    assert not (tmp_path / "run").exists()
