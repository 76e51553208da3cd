import dataclasses
from functools import partial
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from resunet_jax import (
    Config,
    LoadedModel,
    Segmenter,
    cascade,
    init_variables,
    load_model,
    load_segmenter,
    save_model,
    segment_scan,
)
from resunet_jax.data.cases import find_cases
from resunet_jax.data.prepared import prepare_volume
from resunet_jax.data.volumes import read_volume, write_nifti
from resunet_jax.errors import InputError
from resunet_jax.inference import segment as module
from resunet_jax.inference.segment import native_slices
from resunet_jax.training.tasks import build_model
from tests.conftest import TINY, Trained


@pytest.fixture(scope="module")
def segmenter(trained: Trained) -> Segmenter:
    return load_segmenter(trained.lung, trained.infection)


@pytest.fixture(scope="module")
def scan(trained: Trained) -> Path:
    return find_cases(trained.data)[-1].ct  # the one that is not square


def data(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_masks_have_the_scans_grid(segmenter: Segmenter, scan: Path, tmp_path: Path) -> None:
    written = segment_scan(scan, tmp_path, segmenter)
    stem = scan.name.removesuffix(".nii")
    assert [path.name for path in written] == [f"{stem}_lung.nii.gz", f"{stem}_infection.nii.gz"]
    original = nib.load(scan)
    for path in written:
        mask = nib.load(path)
        assert mask.get_data_dtype() == np.uint8
        assert mask.shape == original.shape
        assert mask.affine.tobytes() == original.affine.tobytes()
        assert set(np.unique(data(path))) <= {0, 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)


@pytest.mark.parametrize(
    ("axes", "flips"), [((2, 0, 1), (1, -1, 1)), ((1, 0, 2), (-1, 1, -1)), ((0, 2, 1), (-1, -1, -1))]
)
def test_permuted_and_flipped_scans_give_the_same_anatomy(
    segmenter: Segmenter, scan: Path, tmp_path: Path, axes, flips
) -> None:
    orientation = np.stack([axes, flips], axis=1)
    moved = tmp_path / "moved.nii.gz"
    nib.save(nib.load(scan).as_reoriented(orientation), moved)
    plain = segment_scan(scan, tmp_path / "plain", segmenter, save_probabilities=True)
    turned = segment_scan(moved, tmp_path / "turned", segmenter, save_probabilities=True)
    for a, b in zip(plain, turned, strict=True):
        reoriented = nib.load(a).as_reoriented(orientation)
        np.testing.assert_array_equal(np.asarray(reoriented.dataobj), data(b))
        np.testing.assert_allclose(reoriented.affine, nib.load(b).affine, atol=1e-4)
    assert any(data(path).any() for path in plain)


def test_slices_in_memory_change_nothing(
    segmenter: Segmenter, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segment_scan(scan, tmp_path / "whole", segmenter)
    monkeypatch.setattr(module, "_SLICES_IN_MEMORY", 4)
    for a, b in zip(whole, segment_scan(scan, tmp_path / "parts", segmenter), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_air_is_looked_for_in_the_whole_scan_not_in_a_part(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICES_IN_MEMORY", 2)
    volume = read_volume(scan)
    values = volume.values.copy()
    values[..., :2] = np.minimum(values[..., :2], 238) + 17  # by themselves, these would be moved by 100 HU
    write_nifti(tmp_path / "scan.nii", values, volume.grid)
    preprocess = TINY["preprocess"]
    parts = list(module.prepared_parts([tmp_path / "scan.nii"], preprocess))
    images, _ = prepare_volume(read_volume(tmp_path / "scan.nii"), preprocess)
    np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), images)
    assert len(parts) > 2
    alone, _ = prepare_volume(dataclasses.replace(volume, values=values[..., :2]), preprocess)
    assert np.abs(alone - images[:2]).max() > 0.05


def test_is_the_cascade_where_there_is_lung_and_nothing_elsewhere(trained: Trained, scan: Path) -> None:
    lung, infection = load_model(trained.lung), load_model(trained.infection)
    images, _ = prepare_volume(read_volume(scan), lung.config.preprocess)
    assert infection.model.lung_closing > 0
    expected = jax.jit(partial(cascade, lung.model, infection.model))(
        lung.variables, infection.variables, images[..., None]
    )
    expected_lung, expected_infection = (np.asarray(p)[..., 0] for p in expected)
    areas = np.sort(expected_lung.max(axis=(1, 2)))
    between = float((areas[len(areas) // 2 - 1] + areas[len(areas) // 2]) / 2)  # half of the slices have lung
    found = Segmenter(lung, infection, 8, {"lung": between}).probabilities(images)
    with_lung = (expected_lung > between).any(axis=(1, 2))
    assert with_lung.sum() == len(images) - len(areas) // 2
    np.testing.assert_allclose(found["lung"], expected_lung, atol=1e-5)
    np.testing.assert_allclose(found["infection"][with_lung], expected_infection[with_lung], atol=1e-5)
    assert not found["infection"][~with_lung].any()
    assert expected_infection[~with_lung].any()


def test_small_regions_are_dropped_from_masks_and_probabilities(
    trained: Trained, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that finds lung wherever it is bright: by regions of the whole scan, not of the part in memory."""
    monkeypatch.setattr(module, "_SLICES_IN_MEMORY", 4)
    lung, infection = load_model(trained.lung), load_model(trained.infection)
    large = load_segmenter(trained.lung, trained.infection, smallest_region=1.0)
    plain, cleaned = (
        segment_scan(scan, tmp_path / name, segmenter, save_probabilities=True)
        for name, segmenter in (("plain", Segmenter(lung, infection)), ("large", large))
    )
    images, boxes = prepare_volume(read_volume(scan), lung.config.preprocess)
    probabilities = large.probabilities(images)
    before = {name: values.copy() for name, values in probabilities.items()}
    large.clean(probabilities)
    regions, count = ndimage.label(before["lung"] > 0.5)
    assert count > 1
    largest = regions == np.argmax(np.bincount(regions.ravel())[1:]) + 1
    np.testing.assert_array_equal(probabilities["lung"] > 0.5, largest)
    without_lung = ~largest.any(axis=(1, 2))
    assert without_lung.any()
    assert not probabilities["infection"][without_lung].any()
    np.testing.assert_array_equal(probabilities["infection"][~without_lung], before["infection"][~without_lung])
    for path, other in zip(plain, cleaned, strict=True):
        assert (data(path) != data(other)).any() or "infection" in path.name
    native = np.stack(list(native_slices(probabilities["lung"], boxes, read_volume(scan).values.shape[:2])), axis=-1)
    np.testing.assert_array_equal(data(cleaned[0]).sum(), (native > 0.5).sum())


def test_batch_size_changes_nothing(trained: Trained, scan: Path) -> None:
    one, seven = (load_segmenter(trained.lung, trained.infection, batch_size=n) for n in (1, 7))
    images, _ = prepare_volume(read_volume(scan), one.preprocess)
    for name, probability in one.probabilities(images).items():
        np.testing.assert_allclose(probability, seven.probabilities(images)[name], atol=1e-6)


def test_probabilities_are_what_the_masks_threshold(segmenter: Segmenter, scan: Path, tmp_path: Path) -> None:
    lung, lung_probability, *_ = segment_scan(scan, tmp_path, segmenter, save_probabilities=True)
    assert lung_probability.name.endswith("_lung_probability.nii.gz")
    probability = data(lung_probability)
    assert probability.dtype == np.float32
    assert 0 <= probability.min() <= probability.max() <= 1
    np.testing.assert_array_equal(data(lung), probability > 0.5)


def test_paste_puts_each_slice_in_its_place() -> None:
    ones = np.ones((2, 8, 8), np.float32)
    boxes = np.array([[1, 2, 5, 6], [0, 0, 3, 3]], np.int32)
    first, second = native_slices(ones, boxes, (10, 12))
    assert first.sum() == 30
    assert first[1:6, 2:8].all()
    assert second.sum() == 9
    assert second[:3, :3].all()


def test_each_model_alone(trained: Trained, scan: Path, tmp_path: Path) -> None:
    written = segment_scan(scan, tmp_path, load_segmenter(trained.lung, None))
    assert [path.name.rsplit("_", 1)[1] for path in written] == ["lung.nii.gz"]
    with pytest.raises(InputError, match="give --lung_checkpoint too"):
        load_segmenter(None, trained.infection)
    with pytest.raises(InputError, match="no model"):
        load_segmenter(None, None)


def test_the_smallest_region_may_be_chosen_anew(trained: Trained, tmp_path: Path) -> None:
    """By default it is what the lung model was trained with."""
    own = load_model(trained.lung).config.predict.smallest_region
    assert load_segmenter(trained.lung, None).smallest_region == own
    assert load_segmenter(trained.lung, None, smallest_region=0.25).smallest_region == 0.25
    with pytest.raises(InputError, match=r"smallest_region is 2.*\[0, 1\]"):
        load_segmenter(trained.lung, None, smallest_region=2)
    config = Config(task="infection_ct", **TINY)
    save_model(tmp_path / "ct", init_variables(build_model(config), jax.random.key(0)), config)
    assert load_segmenter(None, tmp_path / "ct").smallest_region == 0
    with pytest.raises(InputError, match=r"smallest_region: .*give --lung_checkpoint"):
        load_segmenter(None, tmp_path / "ct", smallest_region=0.1)


def test_infection_on_ct_alone_and_by_patches(trained: Trained, scan: Path) -> None:
    """A model on CT alone needs no lung model and is not fed by one; its patches are seen apart."""
    train = dataclasses.replace(TINY["train"], patch_factor=2)
    config = Config(task="infection_ct", **{**TINY, "train": train})
    model = build_model(config)
    loaded = LoadedModel(model, init_variables(model, jax.random.key(0)), config)
    lung = load_model(trained.lung)
    images, _ = prepare_volume(read_volume(scan), config.preprocess)
    alone = Segmenter(None, loaded).probabilities(images)
    beside = Segmenter(lung, loaded).probabilities(images)
    assert (set(alone), set(beside)) == ({"infection"}, {"lung", "infection"})
    with_lung = (beside["lung"] > 0.5).any(axis=(1, 2))
    np.testing.assert_allclose(alone["infection"][with_lung], beside["infection"][with_lung], atol=1e-6)
    whole = LoadedModel(model, loaded.variables, dataclasses.replace(config, train=TINY["train"]))
    quadrant = Segmenter(None, whole).probabilities(np.ascontiguousarray(images[:, :16, 16:]))
    np.testing.assert_allclose(alone["infection"][:, :16, 16:], quadrant["infection"], atol=1e-6)
    assert not np.allclose(alone["infection"], Segmenter(None, whole).probabilities(images)["infection"], atol=1e-3)
