import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from resunet_jax import (
    Config,
    LoadedModel,
    Predictor,
    cascade,
    init_variables,
    load_model,
    load_predictor,
    save_model,
    segment_scan,
)
from resunet_jax.config import PostprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import air_offset, prepare_volume
from resunet_jax.data.readers import open_scan, read_mask, read_volume
from resunet_jax.data.slice_cache import PreparedCase, prepare_cases
from resunet_jax.data.volume import Grid
from resunet_jax.errors import InputError
from resunet_jax.inference import scan as module
from resunet_jax.inference.predictor import GEOMETRIC_MEAN, THRESHOLDS, choose_threshold, jitted_maps
from resunet_jax.inference.uncertainty import compare_members, uncertainty_map
from resunet_jax.metrics.overlap import confusion_counts, hard_metrics
from resunet_jax.model.build import adds_lesions, build_model
from resunet_jax.model.cascade import Averaging, infection_input, predict_views
from resunet_jax.model.resunet import Variables
from resunet_jax.weights.store import load_threshold
from tests.conftest import TINY, WITH_CONTEXT, Trained, with_averaging, write_nifti


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


@pytest.fixture(scope="module")
def scan(trained: Trained) -> Path:
    return find_cases(trained.data)[-1].ct  # the one that is not square


def data(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_masks_have_the_scans_grid(predictor: Predictor, scan: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scans in it, where one is expected; use `segment_scans`"):
        segment_scan(scan.parent, tmp_path, predictor)
    written = segment_scan(scan, tmp_path, predictor)
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
    predictor: Predictor, scan: Path, tmp_path: Path, axes, flips
) -> None:
    orientation = np.stack([axes, flips], axis=1)
    moved = tmp_path / "moved.nii.gz"
    nib.save(nib.load(scan).as_reoriented(orientation), moved)
    plain = segment_scan(scan, tmp_path / "plain", predictor, save_probabilities=True)
    turned = segment_scan(moved, tmp_path / "turned", predictor, save_probabilities=True)
    for a, b in zip(plain, turned, strict=True):
        reoriented = nib.load(a).as_reoriented(orientation)
        np.testing.assert_array_equal(np.asarray(reoriented.dataobj), data(b))
        np.testing.assert_allclose(reoriented.affine, nib.load(b).affine, atol=1e-4)
    assert any(data(path).any() for path in plain)


def test_arguments_that_make_no_sense_are_refused(trained: Trained) -> None:
    models = (trained.lung, trained.infection)
    with pytest.raises(InputError, match="`batch_size` is 0; it must be at least 1"):
        load_predictor(*models, batch_size=0)
    with pytest.raises(InputError, match=r"there is no postprocess\.foo; there are postprocess\.threshold, "):
        load_predictor(*models, infection_postprocess={"foo": 1})


def test_the_size_of_chunks_changes_nothing(
    predictor: Predictor, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segment_scan(scan, tmp_path / "whole", predictor)
    monkeypatch.setattr(module, "CHUNK_SLICES", 4)
    for a, b in zip(whole, segment_scan(scan, tmp_path / "chunks", predictor), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_air_is_looked_for_in_the_whole_scan_not_in_a_chunk(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SLICES", 2)
    volume = read_volume(scan)
    values = volume.values.copy()
    values[..., :2] = np.minimum(values[..., :2], 238) + 17  # by themselves, these would be shifted by 100 HU
    write_nifti(tmp_path / "scan.nii", values, volume.grid)
    preprocess = WITH_CONTEXT
    with open_scan(tmp_path / "scan.nii") as opened:
        chunks = list(module.iter_chunks(opened, preprocess, air_offset(opened, preprocess)))
    images, _ = prepare_volume(read_volume(tmp_path / "scan.nii"), preprocess)
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk, _ in chunks]), images)
    assert len(chunks) > 2
    alone, _ = prepare_volume(dataclasses.replace(volume, values=values[..., :2]), preprocess)
    assert np.abs(alone - images[:2]).max() > 0.05


def test_is_the_cascade_where_there_is_lung_and_nothing_elsewhere(trained: Trained, scan: Path) -> None:
    lung, infection = load_model(trained.lung), load_model(trained.infection)
    images, _ = prepare_volume(read_volume(scan), infection.config.preprocess)
    assert infection.model.closing_fraction > 0
    expected = jax.jit(partial(cascade, lung.model, infection.model))(lung.variables, infection.variables, images)
    expected_lung, expected_infection = (np.asarray(p)[..., 0] for p in expected)
    areas = np.sort(expected_lung.max(axis=(1, 2)))
    between = float((areas[len(areas) // 2 - 1] + areas[len(areas) // 2]) / 2)  # half of the slices have lung
    found = Predictor(lung, infection, 8, {"lung": between}).slice_probabilities(images)
    with_lung = (expected_lung > between).any(axis=(1, 2))
    assert with_lung.sum() == len(images) - len(areas) // 2
    np.testing.assert_allclose(found["lung"], expected_lung, atol=1e-5)
    np.testing.assert_allclose(found["infection"][with_lung], expected_infection[with_lung], atol=1e-5)
    assert not found["infection"][~with_lung].any()
    assert expected_infection[~with_lung].any()


def test_small_components_are_removed_from_masks_and_probabilities(
    trained: Trained, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that finds lung wherever it is bright: by components of the whole scan, not of the chunk in memory."""
    monkeypatch.setattr(module, "CHUNK_SLICES", 4)
    lung, infection = load_model(trained.lung), load_model(trained.infection)
    large = load_predictor(trained.lung, trained.infection, min_component_fraction=1.0)
    plain, cleaned = (
        segment_scan(scan, tmp_path / name, predictor, save_probabilities=True)
        for name, predictor in (("plain", Predictor(lung, infection)), ("large", large))
    )
    images, boxes = prepare_volume(read_volume(scan), infection.config.preprocess)
    probabilities = large.slice_probabilities(images)
    before = {name: values.copy() for name, values in probabilities.items()}
    grid = read_volume(scan).grid
    large.postprocess(probabilities, boxes, grid)
    components, count = ndimage.label(before["lung"] > 0.5)
    assert count > 1
    largest = components == np.argmax(np.bincount(components.ravel())[1:]) + 1
    np.testing.assert_array_equal(probabilities["lung"] > 0.5, largest)
    without_lung = ~largest.any(axis=(1, 2))
    assert without_lung.any()
    assert not probabilities["infection"][without_lung].any()
    np.testing.assert_array_equal(probabilities["infection"][~without_lung], before["infection"][~without_lung])
    for path, other in zip(plain, cleaned, strict=True):
        assert (data(path) != data(other)).any() or "infection" in path.name
    native = large.to_native_grid(probabilities, boxes, read_volume(scan).values.shape[:2])
    assert data(cleaned[0]).sum() == native["lung"].mask.sum() > 0
    scanned = large.scan_probabilities(images, boxes, grid)
    for name, expected in probabilities.items():
        np.testing.assert_array_equal(scanned[name], expected)


def test_batch_size_changes_nothing(trained: Trained, scan: Path) -> None:
    one, seven = (load_predictor(trained.lung, trained.infection, batch_size=n) for n in (1, 7))
    images, _ = prepare_volume(read_volume(scan), one.preprocess)
    for name, probability in one.slice_probabilities(images).items():
        np.testing.assert_allclose(probability, seven.slice_probabilities(images)[name], atol=1e-6)


def test_slices_go_through_in_small_batches_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, shapes = load_predictor(None, None, batch_size=8), []

    def record(variables: Variables, x: np.ndarray) -> np.ndarray:
        shapes.append(x.shape)
        return x[..., :1]

    monkeypatch.setitem(predictor.__dict__, "_jitted", {"lung": record, "infection": record})
    images = np.random.default_rng(0).random((5, 128, 128, 3), np.float32)
    probabilities = predictor.slice_probabilities(images)
    assert shapes == [(4, 128, 128, 1)] * 2 + [(4, 128, 128, 4)] * 2
    for probability in probabilities.values():  # each slice in its place, what fills the last batch in none
        np.testing.assert_array_equal(probability, images[..., 0])


def test_on_cpus_a_batch_needs_the_memory_of_one_slice(trained: Trained) -> None:
    loaded = load_model(trained.lung)
    program = jitted_maps(loaded)

    def temporary_bytes(slices: int) -> int:
        compiled = program.lower(loaded.variables, np.zeros((slices, 32, 32, 1), np.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 1.5 * temporary_bytes(1)


def test_probabilities_are_what_the_masks_threshold(predictor: Predictor, scan: Path, tmp_path: Path) -> None:
    lung, lung_probability, *_ = segment_scan(scan, tmp_path, predictor, save_probabilities=True)
    assert lung_probability.name.endswith("_lung_probability.nii.gz")
    probability = data(lung_probability)
    assert probability.dtype == np.float32
    assert 0 <= probability.min() <= probability.max() <= 1
    np.testing.assert_array_equal(data(lung), probability > 0.5)


def test_paste_puts_each_slice_in_its_place() -> None:
    ones = np.ones((2, 8, 8), np.float32)
    boxes = np.array([[1, 2, 5, 6], [0, 0, 3, 3]], np.int32)
    pasted = Predictor(None, None).to_native_grid({"lung": ones}, boxes, (10, 12))["lung"]
    assert pasted.probability.shape == pasted.mask.shape == (10, 12, 2)
    np.testing.assert_array_equal(pasted.mask, pasted.probability > 0.5)
    first, second = np.moveaxis(pasted.probability, -1, 0)
    assert first.sum() == 30
    assert first[1:6, 2:8].all()
    assert second.sum() == 9
    assert second[:3, :3].all()
    assert all(array[..., k].flags.c_contiguous for array in pasted for k in range(2))  # or they are slow to go through


def test_each_model_alone(trained: Trained, scan: Path, tmp_path: Path) -> None:
    written = segment_scan(scan, tmp_path, load_predictor(trained.lung, None))
    assert [path.name.rsplit("_", 1)[1] for path in written] == ["lung.nii.gz"]
    with pytest.raises(InputError, match="give `lung_checkpoint` too"):
        load_predictor(None, trained.infection)
    assert load_predictor(None, None).structures == ("lung", "infection")  # the shipped pair


def test_the_component_fraction_may_be_overridden(trained: Trained, tmp_path: Path) -> None:
    """By default it is what the lung model was trained with."""
    own = load_model(trained.lung).config.postprocess.min_component_fraction
    assert load_predictor(trained.lung, None).min_component_fraction == own
    assert load_predictor(trained.lung, None, min_component_fraction=0.25).min_component_fraction == 0.25
    with pytest.raises(InputError, match=r"min_component_fraction is 2.*at most 1"):
        load_predictor(trained.lung, None, min_component_fraction=2)
    config = Config(task="infection_ct", **TINY)
    save_model(tmp_path / "ct", init_variables(build_model(config), jax.random.key(0)), config)
    assert load_predictor(None, tmp_path / "ct").min_component_fraction == 0
    with pytest.raises(InputError, match=r"`min_component_fraction`: .*give `lung_checkpoint`"):
        load_predictor(None, tmp_path / "ct", min_component_fraction=0.1)


def test_infection_on_ct_alone_and_by_patches(trained: Trained, scan: Path) -> None:
    """A model on CT alone needs no lung model and is not fed by one; its patches are processed independently."""
    patches = dataclasses.replace(TINY["model"], patch_grid=2)
    config = Config(task="infection_ct", **{**TINY, "model": patches})
    model = build_model(config)
    loaded = LoadedModel(model, init_variables(model, jax.random.key(0)), config)
    lung = load_model(trained.lung)
    images, _ = prepare_volume(read_volume(scan), config.preprocess)
    alone = Predictor(None, loaded).slice_probabilities(images)
    cascaded = Predictor(lung, loaded).slice_probabilities(images)
    assert (set(alone), set(cascaded)) == ({"infection"}, {"lung", "infection"})
    with_lung = (cascaded["lung"] > 0.5).any(axis=(1, 2))
    np.testing.assert_allclose(alone["infection"][with_lung], cascaded["infection"][with_lung], atol=1e-6)
    whole = LoadedModel(model, loaded.variables, dataclasses.replace(config, model=TINY["model"]))
    quadrant = Predictor(None, whole).slice_probabilities(np.ascontiguousarray(images[:, :16, 16:]))
    np.testing.assert_allclose(alone["infection"][:, :16, 16:], quadrant["infection"], atol=1e-6)
    assert not np.allclose(
        alone["infection"], Predictor(None, whole).slice_probabilities(images)["infection"], atol=1e-3
    )


@pytest.fixture(scope="module")
def validation(trained: Trained) -> tuple[PreparedCase, dict[str, np.ndarray], Grid]:
    """A case and its reference masks on the native grid."""
    (case,) = [case for case in find_cases(trained.data) if case.id == "coronacases_002"]
    (prepared,) = prepare_cases([case], WITH_CONTEXT, trained.cache)
    grid = read_volume(case.ct).grid
    paths = {"lung": case.lung_mask, "infection": case.infection_mask}
    return prepared, {name: read_mask(path, case.ct, grid) > 0 for name, path in paths.items()}, grid


def dice_of_written_masks(
    predictor: Predictor, structure: str, prepared: PreparedCase, reference: np.ndarray, folder: Path
) -> dict[float, float]:
    """By threshold, the Dice of the files that `segment_scan` writes."""
    dice = {}
    for threshold in THRESHOLDS:
        other = dataclasses.replace(predictor, thresholds={structure: threshold})
        other.__dict__["_jitted"] = predictor._jitted  # compiled once
        written = segment_scan(prepared.case.ct, folder, other)
        grid = read_volume(prepared.case.ct).grid
        mask = read_mask(written[predictor.structures.index(structure)], prepared.case.ct, grid) > 0
        dice[threshold] = hard_metrics(confusion_counts(mask, reference))["dice"]
    return dice


class IntensityPredictor(Predictor):
    """What is as dark as lung is lung, but for one slice, and what is bright is infection: each threshold matters."""

    def _run(self, name: str, inputs: np.ndarray) -> np.ndarray:
        image = inputs[..., 0]
        if name == "infection":
            return np.clip(1.4 * image - 0.3, 0, 1)[None]
        lung = np.exp(-(((image - 0.3) / 0.2) ** 2))
        lung[len(lung) // 2] = 0
        return lung[None]


@pytest.mark.parametrize(
    ("kind", "structure", "fraction"),
    [
        (Predictor, "lung", 0.0),
        (Predictor, "lung", 1.0),
        (IntensityPredictor, "infection", 0.0),
        (IntensityPredictor, "infection", 1.0),
    ],
)
def test_threshold_is_the_best_of_the_written_masks(
    trained: Trained, validation, tmp_path: Path, kind: type[Predictor], structure: str, fraction: float
) -> None:
    """Gated by the lung mask, without its small components, on the native grid."""
    prepared, references, grid = validation
    reference = references[structure]
    loaded = load_predictor(trained.lung, trained.infection, min_component_fraction=fraction)
    predictor = kind(loaded.lung, loaded.infection)
    dice = dice_of_written_masks(predictor, structure, prepared, reference, tmp_path)
    threshold, best = choose_threshold(predictor, structure, [(prepared, reference, grid)])
    assert best == pytest.approx(dice[threshold], abs=1e-12)
    assert best == pytest.approx(max(dice.values()), abs=1e-12)
    assert len(set(dice.values())) > 3  # the choice matters
    if fraction:  # and so does what is removed
        whole = kind(load_model(trained.lung), loaded.infection)
        assert choose_threshold(whole, structure, [(prepared, reference, grid)])[1] != best


def test_training_keeps_the_threshold_of_its_best_checkpoint(trained: Trained, validation) -> None:
    prepared, references, grid = validation
    values = json.loads((trained.lung / "threshold.json").read_text())
    chosen = choose_threshold(load_predictor(trained.lung, None), "lung", [(prepared, references["lung"], grid)])
    assert (values["threshold"], values["mean_dice"]) == chosen
    assert values["chosen_on"] == ["coronacases_002"]
    history = [json.loads(line) for line in (trained.lung / "metrics.jsonl").read_text().splitlines()]
    assert values["step"] == min(history, key=lambda record: record["val_loss"])["step"]


class FixedPredictor(Predictor):
    """Its probabilities are the images."""

    def slice_probabilities(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"lung": images[..., 0].astype(np.float32)}


def fixed_case(probability: np.ndarray, reference: np.ndarray) -> tuple[PreparedCase, np.ndarray, Grid]:
    """Of (slices, S, S) arrays, each slice uncropped."""
    slices, size, _ = probability.shape
    boxes = np.tile(np.array([0, 0, size, size], np.int32), (slices, 1))
    images = probability[..., None]
    case: PreparedCase = PreparedCase(SimpleNamespace(id="a"), "digest", images, boxes, reference[..., None], None)
    return case, np.moveaxis(reference > 0, 0, -1), Grid((size, size, slices), np.eye(4))


def test_threshold_is_the_best_of_a_naive_search(rng: np.random.Generator) -> None:
    targets = rng.random((3, 3, 8, 8)) > 0.7
    volumes = [((0.3 * rng.random(t.shape) + 0.5 * t).astype(np.float32), t) for t in targets]
    threshold, dice = choose_threshold(FixedPredictor(None, None), "lung", [fixed_case(*v) for v in volumes])
    naive = {
        value: np.mean([2 * ((p > value) & t).sum() / ((p > value).sum() + t.sum()) for p, t in volumes])
        for value in THRESHOLDS
    }
    assert dice == pytest.approx(max(naive.values()))
    assert naive[threshold] == pytest.approx(dice)
    assert all(abs(threshold - 0.5) <= abs(value - 0.5) for value in THRESHOLDS if naive[value] == naive[threshold])


def test_threshold_weighs_volumes_alike_and_leaves_out_empty_ones() -> None:
    """The best of one big volume is 0.2, of two small ones 0.8: each volume has one vote, an empty one none."""

    def choose(*cases) -> tuple[float, float] | None:
        return choose_threshold(FixedPredictor(None, None), "lung", cases)

    half = np.indices((4, 16, 16))[0] < 2
    big = fixed_case(np.where(half, 0.25, 0.1).astype(np.float32), half)
    first = np.zeros((1, 2, 2), bool)
    first[0, 0] = True
    small = fixed_case(np.where(first, 0.9, 0.7).astype(np.float32), first)
    empty = fixed_case(np.full((1, 2, 2), 0.9, np.float32), np.zeros((1, 2, 2), bool))
    assert choose(big)[0] < 0.25
    assert choose(big, small, small)[0] < 0.25  # else the big one is missed altogether
    assert choose(small, empty) == (0.7, 1.0)
    assert choose(empty) is None
    assert choose() is None


def test_no_slice_with_lung_is_no_infection(trained: Trained, scan: Path) -> None:
    lung, infection = load_model(trained.lung), load_model(trained.infection)
    images, _ = prepare_volume(read_volume(scan), infection.config.preprocess)
    found = Predictor(lung, infection, 8, {"lung": 0.99999}).slice_probabilities(images)
    assert not (found["lung"] > 0.99999).any()
    assert not found["infection"].any()


def test_a_models_own_threshold_is_used_unless_another_is_given(trained: Trained) -> None:
    predictor = load_predictor(trained.lung, trained.infection)
    assert (predictor.threshold("lung"), predictor.threshold("infection")) == (0.5, 0.5)
    loaded = load_model(trained.infection)
    postprocess = dataclasses.replace(loaded.config.postprocess, threshold=0.3)
    infection = loaded._replace(config=dataclasses.replace(loaded.config, postprocess=postprocess))
    assert Predictor(predictor.lung, infection).mask_settings["thresholds"] == {"lung": 0.5, "infection": 0.3}
    assert Predictor(predictor.lung, infection, thresholds={"infection": 0.7}).threshold("infection") == 0.7
    given = load_predictor(trained.lung, trained.infection, thresholds={"lung": 0.4, "infection": 0.6})
    assert (given.threshold("lung"), given.threshold("infection")) == (0.4, 0.6)
    for thresholds in ({"infecton": 0.3}, {"infection": 1.5}, {"lung": 0.0}):
        with pytest.raises(InputError, match=f"`thresholds`: {next(iter(thresholds))} is"):
            load_predictor(trained.lung, trained.infection, thresholds=thresholds)
    validated = {"validated_threshold": True, "thresholds": {"lung": 0.4}}
    both = load_predictor(trained.lung, trained.infection, **validated)
    assert both.mask_thresholds == {"lung": 0.4, "infection": load_threshold(trained.infection)}
    with pytest.raises(InputError, match="`thresholds` gives all of them; drop one of the two"):
        load_predictor(trained.lung, None, **validated)


@pytest.mark.parametrize("fields", [{"gate": "closed_lung"}, {"gate_closing_mm": 5.0}])
def test_a_gate_without_lungs_is_refused(trained: Trained, tmp_path: Path, fields: dict) -> None:
    loaded = load_model(trained.lung)
    ct_only = dataclasses.replace(loaded.config, task="infection_ct")
    save_model(tmp_path / "ct_only", loaded.variables, ct_only)
    with pytest.raises(InputError, match="the gate is made of the lungs; give `lung_checkpoint` too"):
        load_predictor(None, tmp_path / "ct_only", infection_postprocess=fields)
    plain = load_predictor(None, tmp_path / "ct_only", infection_postprocess={"gate": "none", "min_lesion_ml": 1.0})
    assert plain.infection_postprocess["min_lesion_ml"] == 1.0


def test_adding_lesions_with_a_model_of_one_view_is_refused(trained: Trained, tmp_path: Path) -> None:
    fields = {"infected_scan_ml": 10.0}
    for needless in (fields, {"infected_scan_odds": 2.0}):
        with pytest.raises(InputError, match=r"`infected_scan_\w+`: no lesions are added, as the model has one view"):
            load_predictor(trained.lung, trained.infection, infection_postprocess=needless)
    without = load_predictor(trained.lung, trained.infection, infection_postprocess={"infected_scan_ml": 0.0})
    assert "infected_scan_ml" not in without.infection_postprocess
    _, variables, config = with_averaging(load_model(trained.infection))
    save_model(tmp_path / "two_views", variables, config)
    found = load_predictor(trained.lung, tmp_path / "two_views", infection_postprocess=fields)
    assert found.infection_postprocess["infected_scan_ml"] == 10


def test_a_lung_model_without_context_feeds_an_infection_model_with_it(trained: Trained) -> None:
    lung, infection = (load_model(path).config.preprocess for path in (trained.lung, trained.infection))
    assert (lung.context_mm, infection.context_mm) == (0.0, 5.0)
    assert lung.can_feed(infection)
    assert infection.can_feed(infection)
    assert not infection.can_feed(lung)
    assert not dataclasses.replace(infection, context_mm=3.0).can_feed(infection)
    assert not dataclasses.replace(lung, image_size=64).can_feed(infection)
    assert Predictor(load_model(trained.lung), load_model(trained.infection)).preprocess == infection


def test_a_scan_upside_down_gets_the_same_masks_upside_down(trained: Trained, scan: Path) -> None:
    """A header that is wrong about head and feet exchanges the slices below and above."""
    predictor = load_predictor(trained.lung, trained.infection)
    volume = read_volume(scan)
    turned = dataclasses.replace(volume, values=np.ascontiguousarray(volume.values[..., ::-1]))
    (images, _), (others, _) = (prepare_volume(one, predictor.preprocess, 0.0) for one in (volume, turned))
    np.testing.assert_array_equal(others[::-1][..., [0, 2, 1]], images)
    assert not np.array_equal(images[..., 1], images[..., 2])
    found, flipped = (predictor.slice_probabilities(one) for one in (images, others))
    for name in ("lung", "infection"):
        np.testing.assert_allclose(flipped[name][::-1], found[name], rtol=0, atol=1e-6)
    assert found["infection"].any()


def test_models_with_averaging_give_a_mirrored_scan_mirrored_masks(trained: Trained, scan: Path) -> None:
    predictor = Predictor(with_averaging(load_model(trained.lung)), with_averaging(load_model(trained.infection)))
    images, _ = prepare_volume(read_volume(scan), predictor.preprocess)
    found, mirrored = (predictor.slice_probabilities(np.ascontiguousarray(one)) for one in (images, images[:, :, ::-1]))
    for name in ("lung", "infection"):
        np.testing.assert_allclose(mirrored[name][:, :, ::-1], found[name], rtol=0, atol=1e-6)
    assert found["infection"].any()


def with_added_lesions(trained: Trained, **fields: Any) -> Predictor:
    """Both models with two views; every scan is surely infected, and a lesion is added wherever one may be."""
    added = {"infected_scan_ml": 1e-9, "infected_scan_odds": 1000.0, "infected_scan_lesion_probability": 0.0}
    lesions = {"gate": "none", "min_lesion_ml": 1e-9, "min_lesion_probability": 0.0, "keep_lesion_ml": 0.0}
    postprocess = PostprocessConfig(threshold=0.5, **{**added, **lesions, **fields})
    lung, infection = (with_averaging(load_model(one)) for one in (trained.lung, trained.infection))
    config = dataclasses.replace(infection.config, postprocess=postprocess)
    return Predictor(lung, infection._replace(config=config))


def test_the_geometric_mean_of_the_views_comes_beside_the_same_probabilities(trained: Trained, scan: Path) -> None:
    predictor, plain = with_added_lesions(trained), with_added_lesions(trained, infected_scan_ml=0.0)
    volume = read_volume(scan)
    images, boxes = prepare_volume(volume, predictor.preprocess)
    found, expected = predictor.slice_probabilities(images), plain.slice_probabilities(images)
    assert set(found) == {"lung", "infection", GEOMETRIC_MEAN}
    assert set(predictor.to_native_grid(found, boxes, volume.values.shape[:2])) == {"lung", "infection"}
    assert set(expected) == {"lung", "infection"} == set(predictor.without_averaging.slice_probabilities(images))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    infection = predictor.models["infection"]
    stacked = infection_input(infection.model, images, found["lung"][..., None])
    views = predict_views(
        infection.model, infection.variables, stacked, averaging=Averaging(mirroring=True, context=True)
    )
    has_lung = (found["lung"] > 0.5).any(axis=(1, 2), keepdims=True)
    product = np.asarray(views[0] * views[1])[..., 0]
    np.testing.assert_allclose(found[GEOMETRIC_MEAN], np.sqrt(product) * has_lung, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(views[0] - views[1])).max() > 0.01


class TwoLesionsPredictor(Predictor):
    """A lesion whose probability is 0.9; and one of 0.6, where the geometric mean of the views says 0.4."""

    def _run(self, name: str, inputs: np.ndarray) -> np.ndarray:
        if name == "lung":
            return np.ones((1, *inputs.shape[:-1]), np.float32)
        maps = np.zeros((2, *inputs.shape[:-1]), np.float32)
        maps[:, :, 8:12, 8:12] = 0.9
        maps[0, :, 20:24, 20:24], maps[1, :, 20:24, 20:24] = 0.6, 0.4
        return maps[: 1 + adds_lesions(self.models[name].config)]


def test_masks_and_uncertainty_have_the_added_lesions(trained: Trained, scan: Path, tmp_path: Path) -> None:
    """Members, which see a slice once, do not have them."""
    fields = {"infected_scan_odds": 3.0, "min_lesion_probability": 0.8}
    predictor, plain = (
        TwoLesionsPredictor(*with_added_lesions(trained, **fields, **more).models.values())
        for more in ({}, {"infected_scan_ml": 0.0})
    )
    volume = read_volume(scan)
    images, boxes = prepare_volume(volume, predictor.preprocess)
    for one, probability in ((predictor, 3 * 0.4 / (0.6 + 3 * 0.4)), (plain, 0)):
        expected = np.zeros(images.shape[:-1], np.float32)
        expected[:, 8:12, 8:12], expected[:, 20:24, 20:24] = 0.9, probability
        native = one.to_native_grid({"infection": expected}, boxes, volume.values.shape[:2])["infection"]
        _, mask, uncertainty = segment_scan(scan, tmp_path / str(probability), one, uncertainty=True)
        np.testing.assert_array_equal(data(mask), volume.grid.from_pls(native.mask))
        mean, _ = compare_members(one, images, boxes, volume.grid)
        assert not mean[:, 20:24, 20:24].any()
        mean[:, 20:24, 20:24] = probability
        native = one.to_native_grid({"infection": mean}, boxes, volume.values.shape[:2])["infection"]
        np.testing.assert_array_equal(data(uncertainty), volume.grid.from_pls(uncertainty_map(native.probability)))


def test_no_lesion_is_added_where_the_gate_lets_none_be(trained: Trained) -> None:
    """Of three lesions one is in the mask, and of the others one lies outside the lungs."""
    predictor = with_added_lesions(trained, gate="closed_lung", gate_closing_mm=2.0)
    lung = np.zeros((4, 32, 32), np.float32)
    lung[:, 2:20, 2:14] = lung[:, 2:20, 18:30] = 1
    infection, geometric_mean = np.zeros_like(lung), np.zeros_like(lung)
    infection[:, 4:8, 4:8] = 0.9
    for rows in (slice(12, 16), slice(24, 28)):
        infection[:, rows, 20:24], geometric_mean[:, rows, 20:24] = 0.1, 0.4
    boxes, grid = np.tile(np.array([0, 0, 32, 32], np.int32), (4, 1)), Grid((32, 32, 4), np.diag([-1.0, -1, 1, 1]))
    probabilities = {"lung": lung, "infection": infection, GEOMETRIC_MEAN: geometric_mean}
    added = predictor.postprocess(probabilities, boxes, grid)
    assert set(probabilities) == {"lung", "infection"}
    assert (infection[:, 12:16, 20:24] > 0.9).all()
    assert not infection[:, 22:].any()
    np.testing.assert_array_equal(np.argwhere(added), np.argwhere(infection > 0.95))
