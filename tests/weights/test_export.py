"""Exports: equal to the cascade and to prediction, readable without this package, and described next to them."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax import cascade, init_variables, load_pretrained, predict_probability, save_model
from resunet_jax.config import INFECTION_POSTPROCESS, CascadeConfig, Config, ModelConfig, PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.phantom import PhantomConfig, make_phantom
from resunet_jax.data.preprocess import air_offset, context_slices, prepare_volume
from resunet_jax.data.readers import open_scan, read_volume
from resunet_jax.data.roi import Box, crop_resize
from resunet_jax.data.volume import Grid, Scan, Volume
from resunet_jax.errors import InputError
from resunet_jax.inference.predictor import GEOMETRIC_MEAN, Predictor
from resunet_jax.inference.scan import segment_opened
from resunet_jax.metrics.calibration import apply_temperature
from resunet_jax.model.build import averaging_of, build_model
from resunet_jax.model.winograd import conv_general_dilated
from resunet_jax.weights import export as module
from resunet_jax.weights.export import (
    describe_cascade,
    export_cascade,
    export_cascade_from_hu,
    prepare_hu,
    resize_matrix,
    scale_probability,
    write_export,
)
from resunet_jax.weights.pretrained import load_pair
from resunet_jax.weights.store import LoadedModel, fingerprint
from tests.conftest import ROOT, TINY, run_script

THRESHOLDS = {"lung": 0.5, "infection": 0.5}
MOVED = 1e-5
"""The share of voxels that rounding may move over a threshold: prediction convolves in another way on CPUs."""


def random_model(task: str, seed: int, **changes: object) -> LoadedModel:
    config = Config(task=task, **{**TINY, **changes})
    model = build_model(config)
    variables = init_variables(model, jax.random.key(seed))
    return LoadedModel(model, variables, config)


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, LoadedModel]:
    return tuple(load_pair())


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return load_pretrained()


@pytest.fixture(scope="module")
def written(pair: tuple[LoadedModel, LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "cascade.jaxexport"
    write_export(path, *pair, thresholds=THRESHOLDS)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("scans") / "phantom"
    make_phantom(root, PhantomConfig(volumes=2, slices=12, downsample=2))
    return [case.ct for case in find_cases(root)]


@pytest.fixture(scope="module")
def images(scans: list[Path], predictor: Predictor) -> np.ndarray:
    return prepare_volume(read_volume(scans[0]), predictor.preprocess)[0]


def reload(path: Path) -> jax.export.Exported:
    return jax.export.deserialize(bytearray(path.read_bytes()))


def test_the_reloaded_artifact_equals_the_cascade(
    written: Path, pair: tuple[LoadedModel, LoadedModel], images: np.ndarray
) -> None:
    exported, (lung, infection) = reload(written), pair
    models = lung.model, infection.model, lung.variables, infection.variables
    run = jax.jit(partial(cascade, *models, infection_averaging=averaging_of(infection.config)))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert str(exported.in_avals[0].shape[0]) == "b"
    for count in (1, 3, 8):
        batch = images[2 : 2 + count]
        expected_lung, expected_infection = run(batch)
        has_lung = (np.asarray(expected_lung) > 0.5).any(axis=(1, 2, 3), keepdims=True)
        found = jax.jit(exported.call)(batch)
        assert [(one.shape, one.dtype) for one in found] == [((count, 128, 128, 1), np.float32)] * 3
        np.testing.assert_allclose(found[0], expected_lung, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[1], np.where(has_lung, expected_infection, 0), rtol=0, atol=1e-6)
    assert float(found[1].max()) > 0.5  # in some of the eight


def test_without_lung_there_is_no_infection(written: Path, predictor: Predictor, images: np.ndarray) -> None:
    mixed = np.stack([np.zeros_like(images[0]), images[len(images) // 2]])
    lung, infection, geometric_mean = jax.jit(reload(written).call)(mixed)
    assert float(lung[0].max()) <= 0.5
    for one in (infection, geometric_mean):
        assert not np.asarray(one[0]).any()
        assert np.asarray(one[1]).any()
    expected = predictor.slice_probabilities(mixed)
    np.testing.assert_allclose(lung[..., 0], expected["lung"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(infection[..., 0], expected["infection"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(geometric_mean[..., 0], expected[GEOMETRIC_MEAN], rtol=0, atol=1e-5)


def test_patches_closing_and_ct_alone_are_exported() -> None:
    lung = random_model("lung", 0, model=ModelConfig(filters=(4, 8, 16, 32), patch_grid=2))
    for infection in (
        random_model("infection", 1, model=ModelConfig(filters=(4, 8, 16, 32), patch_grid=4)),
        random_model("infection", 1, cascade=CascadeConfig(closing_fraction=0.5)),
        random_model("infection_ct", 2, model=ModelConfig(filters=(4, 8, 16, 32), mirroring=True)),
    ):
        winograd = lung._replace(model=lung.model.clone(convolution=conv_general_dilated))
        exported = export_cascade(winograd, infection, thresholds={"lung": 1e-9, "infection": 0.5})
        images = np.random.default_rng(0).random((3, 32, 32, 1), np.float32)
        expected = jax.jit(
            partial(
                cascade,
                lung.model,
                infection.model,
                lung_patch_grid=lung.config.model.patch_grid,
                infection_patch_grid=infection.config.model.patch_grid,
                infection_averaging=averaging_of(infection.config),
            )
        )(lung.variables, infection.variables, images)
        for found, one in zip(jax.jit(exported.call)(images), expected, strict=True):
            np.testing.assert_allclose(found, one, rtol=0, atol=1e-6)


def test_the_threshold_of_the_lung_is_inside() -> None:
    lung, infection = random_model("lung", 0), random_model("infection_ct", 1)
    images = (
        np.random.default_rng(0).random((4, 32, 32, 1), np.float32)
        * np.linspace(0.1, 1, 4, dtype=np.float32)[:, None, None, None]
    )
    highest = np.asarray(jax.jit(partial(predict_probability, lung.model))(lung.variables, images)).max(axis=(1, 2, 3))
    threshold = float(np.sort(highest)[1:3].mean())  # two slices are above it, two below
    exported = export_cascade(lung, infection, thresholds={"lung": threshold, "infection": 0.5})
    _, found = jax.jit(exported.call)(images)
    np.testing.assert_array_equal(np.asarray(found).any(axis=(1, 2, 3)), highest > threshold)
    assert np.count_nonzero(highest > threshold) == 2


@pytest.mark.parametrize(("length", "size"), [(1, 8), (7, 16), (16, 16), (17, 16), (100, 32), (511, 128), (23, 24)])
def test_the_resize_is_pils(length: int, size: int) -> None:
    image = np.random.default_rng(length).random((length + 6, length + 3), np.float32)
    box = Box(4, 2, length, length)
    rows, columns = (
        np.asarray(resize_matrix(jnp.int32(first), jnp.int32(length), total, size))
        for first, total in zip((4, 2), image.shape, strict=True)
    )
    np.testing.assert_allclose(rows @ image @ columns.T, crop_resize(image, box, size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (513, 300)])
def test_slices_in_hu_are_prepared_as_by_the_package(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    hu = rng.uniform(-1300, 400, (*shape, 3)).astype(np.float32)
    hu[:5] = hu[-3:] = hu[:, :9] = hu[:, -4:] = -1024  # the box is smaller than the slice
    volume = Volume(hu, "hu", Grid((*shape, 3), np.eye(4)))
    images, boxes = prepare_volume(volume, PreprocessConfig(image_size=48, body_dilation=1))
    assert not np.array_equal(boxes[0], (0, 0, *shape))
    found = jax.jit(partial(prepare_hu, size=48))(np.moveaxis(hu, -1, 0)[..., None], boxes)
    np.testing.assert_allclose(found, images, rtol=0, atol=1e-6)


def with_context(hu: np.ndarray, scan: Scan, predictor: Predictor) -> np.ndarray:
    """Slices (rows, columns, slices) in HU as the export wants them: with the slices below and above."""
    step, count = context_slices(predictor.preprocess, scan.grid), hu.shape[-1]
    around = [np.clip(np.arange(count) + shift, 0, count - 1) for shift in (0, -step, step)]
    return np.stack([np.moveaxis(hu[..., picks], -1, 0) for picks in around], axis=-1)


def expected_and_exported(
    scan: Path, predictor: Predictor, exported: jax.export.Exported, *, from_hu: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The masks of `segment_scan`, and those of an export and the package's `postprocess` and `to_native_grid`."""
    with open_scan(scan) as opened:
        segmented = segment_opened(opened, predictor, scan.name)
        slices = opened.grid.oriented_shape[-1]
        expected = {name: segmented.mask(name, 0, slices) for name in predictor.structures}
        offset = air_offset(opened, predictor.preprocess)
        volume = opened.read_slices(0, slices)
        images, boxes = prepare_volume(volume, predictor.preprocess, offset)
        call = jax.jit(exported.call)
        outputs = call(with_context(volume.to_hu(offset), opened, predictor), boxes) if from_hu else call(images)
        names = ("lung", "infection", GEOMETRIC_MEAN)
        probabilities = {name: np.array(one)[..., 0] for name, one in zip(names, outputs, strict=True)}
        predictor.postprocess(probabilities, boxes, opened.grid)
        native = predictor.to_native_grid(probabilities, boxes, opened.grid.oriented_shape[:2])
    return expected, {name: one.mask for name, one in native.items()}


@pytest.mark.parametrize("from_hu", [False, True])
def test_exported_probabilities_give_the_masks_of_prediction(
    written: Path, scans: list[Path], predictor: Predictor, from_hu: bool
) -> None:
    exported = (
        export_cascade_from_hu(predictor.lung, predictor.infection, thresholds=THRESHOLDS)
        if from_hu
        else reload(written)
    )
    for scan in scans:
        expected, found = expected_and_exported(scan, predictor, exported, from_hu=from_hu)
        for name, mask in expected.items():
            assert mask.any()
            assert np.count_nonzero(found[name] != mask) <= MOVED * mask.size, name


def test_a_calibrated_probability_is_the_third_output_and_the_others_stay(
    written: Path, pair: tuple[LoadedModel, LoadedModel], images: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "calibrated"
    metadata = write_export(path, *pair, thresholds=THRESHOLDS, temperature=2.5)
    assert metadata["temperature"] == 2.5
    names = ["lung_probability", "infection_probability", "calibrated_infection_probability", GEOMETRIC_MEAN]
    assert [one["name"] for one in metadata["outputs"]] == names
    plain = jax.jit(reload(written).call)(images)
    lung, infection, calibrated, geometric_mean = jax.jit(reload(path).call)(images)
    for one, expected in zip((lung, infection, geometric_mean), plain, strict=True):
        np.testing.assert_array_equal(one, expected)
    np.testing.assert_allclose(calibrated, apply_temperature(np.asarray(infection), 2.5), rtol=0, atol=1e-6)
    assert float(np.abs(np.asarray(calibrated) - infection).max()) > 0.1
    with pytest.raises(InputError, match="`temperature`"):
        export_cascade(*pair, thresholds=THRESHOLDS, temperature=0.0)


def test_the_program_from_hu_takes_any_shape(pair: tuple[LoadedModel, LoadedModel]) -> None:
    exported = jax.export.deserialize(export_cascade_from_hu(*pair, thresholds=THRESHOLDS).serialize())
    assert [str(one.shape) for one in exported.in_avals] == ["(b, h, w, 3)", "(b, 4)"]
    for count, rows, columns in ((1, 64, 96), (2, 200, 70)):
        hu = np.random.default_rng(0).uniform(-1300, 400, (count, rows, columns, 3)).astype(np.float32)
        boxes = np.tile(np.array([[3, 5, rows - 9, columns - 7]], np.int32), (count, 1))
        found = jax.jit(exported.call)(hu, boxes)
        assert [one.shape for one in found] == [(count, 128, 128, 1)] * 3


def test_the_file_beside_it_says_what_one_has_to_know(
    written: Path, pair: tuple[LoadedModel, LoadedModel], tmp_path: Path
) -> None:
    metadata = json.loads(written.with_name(f"{written.name}.json").read_text(encoding="utf-8"))
    assert metadata["file"] == written.name
    assert metadata["sha256"] == hashlib.sha256(written.read_bytes()).hexdigest()
    (given,), results = metadata["inputs"], metadata["outputs"]
    assert (given["shape"], given["dtype"], given["range"]) == (["b", 128, 128, 3], "float32", [0, 1])
    assert [one["shape"] for one in results] == [["b", 128, 128, 1]] * 3
    assert metadata["platforms"] == ["cpu", "cuda", "tpu"]
    assert metadata["thresholds"] == THRESHOLDS
    assert metadata["preprocessing"]["hu_window"] == [-1250.0, 250.0]
    assert metadata["preprocessing"]["inside"] == []
    assert metadata["preprocessing"]["context_mm"] == 5
    assert len(metadata["preprocessing"]["channels"]) == 3
    assert [one["fingerprint"] for one in metadata["models"].values()] == [fingerprint(one.variables) for one in pair]
    assert metadata["lung_closing"]["fraction"] == pair[1].config.cascade.closing_fraction
    assert metadata["versions"]["jax"] == jax.__version__
    assert "six months" in metadata["readable"]
    assert len(metadata["not_inside"]) == 6
    assert {*INFECTION_POSTPROCESS, "min_component_fraction"} == set(metadata["postprocessing_of_the_package"])
    write_export(tmp_path / "hu", *pair, thresholds=THRESHOLDS, from_hu=True)
    metadata = json.loads((tmp_path / "hu.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in metadata["inputs"]] == ["hu", "boxes"]
    assert metadata["preprocessing"]["inside"] == ["window", "crop", "resize"]
    for file in (*tmp_path.iterdir(), written):  # the paths of source lines are inside by default
        assert str(tmp_path).encode() not in file.read_bytes()
        assert str(ROOT).encode() not in file.read_bytes()


def test_a_model_of_one_view_is_described_without_added_lesions() -> None:
    asking = dataclasses.replace(TINY["postprocess"], infected_scan_ml=10.0)
    for mirroring in (False, True):
        model = ModelConfig(filters=(4, 8, 16, 32), mirroring=mirroring)
        infection = random_model("infection", 1, model=model, postprocess=asking)
        told = describe_cascade(random_model("lung", 0), infection, thresholds=THRESHOLDS)
        assert len(told["outputs"]) == 2 + mirroring
        assert len(told["not_inside"]) == 5 + mirroring
        assert ("infected_scan_ml" in told["postprocessing_of_the_package"]) == mirroring


def test_a_loader_of_ten_lines_needs_only_jax(written: Path, images: np.ndarray, tmp_path: Path) -> None:
    """The loader of the module's docstring, where this package and its libraries cannot be imported."""
    loader = textwrap.dedent(module.__doc__.split("only:\n\n")[1])
    assert len([line for line in loader.splitlines() if line]) <= 10
    missing = ("resunet_jax", "flax", "orbax", "optax", "grain", "nibabel")
    trap = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in missing)
    (tmp_path / "sitecustomize.py").write_text(trap)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "cascade.jaxexport").write_bytes(written.read_bytes())

    def run(code: str) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
        )

    assert "import of resunet_jax halted" in run("import resunet_jax").stderr  # the trap works
    result = run(loader)
    assert result.returncode == 0, result.stderr
    expected = jax.jit(reload(written).call)(images)
    with np.load(tmp_path / "probabilities.npz") as found:
        for name, one in zip(("lung", "infection"), expected, strict=False):
            np.testing.assert_allclose(found[name], one, rtol=0, atol=1e-6)


def test_any_temperature_is_applied_as_by_numpy() -> None:
    p = np.linspace(0, 1, 101, dtype=np.float32)
    for temperature in (1e-4, 5e-3, 0.5, 1.0, 1.83, 1e4):
        expected = apply_temperature(p, temperature)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(scale_probability(p, temperature), expected, atol=2e-5)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    lung, infection = random_model("lung", 0), random_model("infection", 1)
    minmax = [
        random_model(name, 0, preprocess=PreprocessConfig(image_size=32, normalization="minmax"))
        for name in ("lung", "infection")
    ]
    path = tmp_path / "file"
    for models, thresholds, from_hu, message in (
        ((infection, lung), THRESHOLDS, False, "expected a lung model"),
        ((lung, infection), {"lung": 0.5}, False, "that of infection is None"),
        ((lung, infection), {"lung": 1.0, "infection": 0.5}, False, "that of lung is 1"),
        ((lung, infection), {"lung": "0.5", "infection": 0.5}, False, "that of lung is '0.5'"),
        ((lung, minmax[1]), THRESHOLDS, False, "prepared differently"),
        (minmax, THRESHOLDS, True, "`from_hu`"),
    ):
        with pytest.raises(InputError, match=message):
            write_export(path, *models, thresholds=thresholds, from_hu=from_hu)
    for temperature in (0.0, math.inf, "2"):
        with pytest.raises(InputError, match="`temperature`"):
            write_export(path, lung, infection, thresholds=THRESHOLDS, temperature=temperature)
    assert not list(tmp_path.iterdir())
    write_export(path, *minmax, thresholds={name: np.float32(value) for name, value in THRESHOLDS.items()})
    with pytest.raises(InputError, match="exists already"):
        write_export(path, lung, infection, thresholds=THRESHOLDS)


def test_the_script(tmp_path: Path) -> None:
    model = random_model("lung", 0)
    save_model(tmp_path / "lung", model.variables, model.config)
    result = run_script("export", f"--output={tmp_path / 'new' / 'cascade'}")
    assert result.returncode == 0, result.stderr
    assert "images float32 (b, 128, 128, 3)" in result.stdout
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["cascade", "cascade.json"]
    for flags, message in (
        ((f"--output={tmp_path / 'new' / 'cascade'}",), "exists already"),
        ((f"--output={tmp_path / 'a'}", f"--lung_checkpoint={tmp_path / 'none'}"), "no such checkpoint folder"),
        (
            (f"--output={tmp_path / 'a'}", f"--lung_checkpoint={tmp_path / 'lung'}"),
            "--infection_checkpoint, or neither",
        ),
        ((f"--output={tmp_path / 'lung' / 'config.json' / 'a'}",), "cannot be written"),
    ):
        result = run_script("export", *flags)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) <= 2
