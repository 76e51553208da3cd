"""Whatever the file: masks on the scan's own grid, or one line that says why not, and nothing half written."""

import functools
import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resunet_jax import (
    Config,
    LoadedModel,
    ModelConfig,
    Predictor,
    PreprocessConfig,
    init_variables,
    load_model,
    save_model,
    segment_scan,
)
from resunet_jax.data.volume import HU_WINDOW
from resunet_jax.errors import InputError
from resunet_jax.model.build import build_model
from resunet_jax.weights.store import fingerprint

TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8", "c16", "rgb"]
SIZES = st.sampled_from([1, 2, 3, 5, 7, 11, 13, 16, 17, 23, 31, 37])
SPACINGS = st.floats(0.1, 10)
SLOPES = st.sampled_from([None, 0.0, 1.0, 0.5, -1.0, 1e30, 1e-30, float("nan"), float("inf")])
INTERCEPTS = st.sampled_from([0.0, -1024.0, 1e30, float("nan"), float("inf")])
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@functools.cache
def model(task: str) -> LoadedModel:
    config = Config(task=task, preprocess=PreprocessConfig(image_size=16), model=ModelConfig(filters=(1, 1, 1, 1)))
    module = build_model(config)
    return LoadedModel(module, init_variables(module, jax.random.key(len(task))), config)


PREDICTOR = Predictor(model("lung"), model("infection"), batch_size=4)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """A chest, more or less: any type, 1 to 5 slices, odd and prime sizes, and values that should not be there."""
    shape = (draw(SIZES), draw(SIZES), draw(st.integers(1, 5)))
    kind = draw(st.sampled_from(TYPES))
    if kind == "rgb":
        return np.zeros(shape, RGB)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    what = draw(st.sampled_from(["hu", "hu", "hu", "windowed", "constant", "zero", "huge", "stored"]))
    values = {
        "hu": random.integers(-1000, 400, shape).astype(np.float64),
        "windowed": random.integers(0, 256, shape).astype(np.float64),
        "constant": np.full(shape, -500.0),
        "zero": np.zeros(shape),
        "huge": random.normal(size=shape) * 1e30,
        "stored": random.integers(0, 4096, shape).astype(np.float64),
    }[what]
    for bad in draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, -1e38, 1e38]), max_size=2)):
        values[tuple(random.integers(0, shape))] = bad
    dtype = np.dtype(kind)
    if dtype.kind in "iu":
        values = np.clip(np.nan_to_num(values), np.iinfo(dtype).min / 2, np.iinfo(dtype).max / 2)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any permutation and flip of the axes, sometimes oblique."""
    axes = draw(st.permutations(range(3)))
    affine = np.zeros((4, 4))
    for row, column in enumerate(axes):
        affine[row, column] = draw(SPACINGS) * draw(st.sampled_from([-1, 1]))
    affine[:3, 3] = draw(st.floats(-500, 500))
    affine[3, 3] = 1
    if draw(st.integers(0, 3)) == 0:
        angle = draw(st.floats(-0.7, 0.7))
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = turn @ affine
    return affine


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """A NIfTI file as nibabel writes it, with a header that may contradict itself."""
    kind = draw(st.sampled_from([nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image]))
    array = draw(arrays())
    image: Any = kind(array, None, dtype=array.dtype)
    image.set_sform(draw(affines()), code=draw(st.integers(0, 4)))
    if draw(st.booleans()):
        image.set_qform(np.diag([*(draw(SPACINGS) for _ in range(3)), 1]), code=draw(st.integers(0, 4)))
    if draw(st.booleans()):
        text = draw(st.binary(max_size=40))
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text))
    content = bytearray(image.to_bytes())
    # What nibabel does not write: slope and intercept, and a row of the affine, that make no sense.
    number, scale, rows = ("<f4", 112, 280) if kind is nib.Nifti1Image else ("<f8", 176, 400)
    slope, intercept = draw(SLOPES), draw(INTERCEPTS)
    if slope is not None:
        _overwrite(content, scale, [slope, intercept], number)
    if draw(st.integers(0, 15)) == 0:
        row, value = draw(st.integers(0, 2)), draw(st.sampled_from([0.0, np.nan, np.inf, 1e-30, 1e30]))
        _overwrite(content, rows + 4 * row * np.dtype(number).itemsize, [value] * 4, number)
    return bytes(content)


def _overwrite(content: bytearray, place: int, values: list[float], number: str) -> None:
    written = np.array(values).astype(number).tobytes()
    content[place : place + len(written)] = written


def flip(content: bytes, places: list[float]) -> bytes:
    """One bit flipped at each place, given as a fraction of the length; the header, where most hurts, is half of it."""
    changed = bytearray(content)
    for place in places:
        head = min(560, len(content))
        where = int(place * 2 * head) if place < 0.5 else int((2 * place - 1) * len(content))
        changed[min(where, len(content) - 1)] ^= 1 << int(place * 1e6) % 8
    return bytes(changed)


def check_line(error: InputError, path: Path) -> None:
    """One line, which names the file."""
    assert "\n" not in str(error)
    assert str(error).startswith(str(path))


def check(content: bytes, suffix: str) -> bool:
    """Segments the file; whether masks were written. Everything else than the two allowed outcomes fails."""
    folder = Path(tempfile.mkdtemp())
    try:
        scan, output = folder / f"scan{suffix}", folder / "masks"
        scan.write_bytes(content)
        try:
            masks = segment_scan(scan, output, PREDICTOR, assumed=HU_WINDOW)
        except InputError as error:
            check_line(error, scan)
            assert not output.exists() or not any(output.iterdir())
            return False
        original = nib.load(scan)
        assert sorted(output.iterdir()) == sorted(masks)
        for path in masks:
            mask = nib.load(path)
            assert mask.shape == original.shape
            np.testing.assert_array_equal(mask.affine, original.affine)
            assert mask.get_data_dtype() == np.uint8
            assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}
        return True
    finally:
        shutil.rmtree(folder)


def any_image(content: bytes, compressed: bool) -> None:
    check(gzip.compress(content, 1) if compressed else content, ".nii.gz" if compressed else ".nii")


def truncated_gzip(content: bytes, place: float) -> None:
    compressed = gzip.compress(content, 1)
    cut = compressed[: int(place * (len(compressed) - 9))]  # less than the voxels; the checksum is eight bytes
    assert not check(cut, ".nii.gz")


GOOD = nib.Nifti1Image(
    np.random.default_rng(0).integers(-1000, 400, (17, 13, 3)).astype(np.int16), np.eye(4)
).to_bytes()
PLACES = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4)


def flipped_bits(places: list[float]) -> None:
    check(flip(GOOD, places), ".nii")


def flipped_bits_in_gzip(places: list[float]) -> None:
    check(flip(gzip.compress(GOOD, 1), places), ".nii.gz")


@functools.cache
def saved_model() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """A model on disk; the folder is gone with the process."""
    folder, lung = tempfile.TemporaryDirectory(), model("lung")
    save_model(Path(folder.name) / "model", lung.variables, lung.config)
    return folder, Path(folder.name) / "model"


def flipped_bit_in_json(name: str, place: int, bit: int) -> None:
    """Of a saved model: noticed, unless it changes nothing, as space for space."""
    _, saved = saved_model()
    file = saved / name
    content = file.read_bytes()
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    try:
        file.write_bytes(bytes(changed))
        loaded = load_model(saved)
    except InputError as error:
        check_line(error, saved)
        return
    finally:
        file.write_bytes(content)
    expected = model("lung")
    assert name == "files.json"
    assert (fingerprint(loaded.variables), loaded.config) == (fingerprint(expected.variables), expected.config)


FUZZED: dict[Callable[..., None], tuple[st.SearchStrategy[Any], ...]] = {
    any_image: (images(), st.booleans()),
    truncated_gzip: (images(), st.floats(0, 1)),
    flipped_bits: (PLACES,),
    flipped_bits_in_gzip: (PLACES,),
    flipped_bit_in_json: (st.sampled_from(["config.json", "files.json"]), st.integers(0, 2**31), st.integers(0, 7)),
}
EACH = pytest.mark.parametrize("function", FUZZED, ids=lambda function: function.__name__)


@EACH
def test_masks_or_one_line(function: Callable[..., None]) -> None:
    settings.get_profile("seeded")(given(*FUZZED[function])(function))()


@pytest.mark.exhaustive
@EACH
def test_masks_or_one_line_searched_long(function: Callable[..., None]) -> None:
    settings.get_profile("exhaustive")(given(*FUZZED[function])(function))()


def test_a_good_image_gives_masks() -> None:
    assert check(GOOD, ".nii")
    assert check(gzip.compress(GOOD), ".nii.gz")
