import dataclasses
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data import prepared as module
from resunet_jax.data.cases import find_cases
from resunet_jax.data.prepared import prepare_cases, prepare_slice
from resunet_jax.data.volumes import read_mask, read_volume
from resunet_jax.errors import InputError

CONFIG = PreprocessConfig(image_size=32)


@pytest.fixture
def cases(phantom: Path):
    return find_cases(phantom)[:2]


def test_slices_are_those_of_the_scan(cases, tmp_path: Path) -> None:
    prepared = prepare_cases(cases, CONFIG, tmp_path)[1]
    volume = read_volume(cases[1].ct)
    for k in range(volume.values.shape[-1]):
        image, box = prepare_slice(volume, k, CONFIG)
        np.testing.assert_array_equal(prepared.images[k], image)
        np.testing.assert_array_equal(prepared.boxes[k], box)
    assert prepared.images.dtype == np.float32
    assert 0 <= prepared.images.min() < prepared.images.max() <= 1
    assert set(np.unique(prepared.lung)) == set(np.unique(prepared.infection)) == {0, 1}
    assert isinstance(prepared.images, np.memmap)


def test_masks_cover_what_they_did(cases, tmp_path: Path) -> None:
    prepared = prepare_cases(cases, CONFIG, tmp_path)[0]
    volume = read_volume(cases[0].ct)
    lung = read_mask(cases[0].lung_mask, cases[0].ct, volume.grid) > 0
    pixels = prepared.boxes[:, 2] * prepared.boxes[:, 3] / CONFIG.image_size**2
    np.testing.assert_allclose((prepared.lung.sum(axis=(1, 2)) * pixels).sum(), lung.sum(), rtol=0.02)


def test_second_time_nothing_is_read(cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_cases(cases, CONFIG, tmp_path)
    monkeypatch.setattr(module, "read_volume", lambda path: pytest.fail("read again"))
    second = prepare_cases(cases, CONFIG, tmp_path)
    np.testing.assert_array_equal(first[0].images, second[0].images)


def test_settings_and_content_make_the_key(cases, tmp_path: Path) -> None:
    prepare_cases(cases, CONFIG, tmp_path)
    prepare_cases(cases, dataclasses.replace(CONFIG, normalization="minmax"), tmp_path)
    other = dataclasses.replace(cases[0], lung_mask=cases[0].infection_mask)
    prepare_cases([other], CONFIG, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_an_interrupted_build_is_not_taken_for_a_whole_one(
    cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "prepare_mask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_cases(cases, CONFIG, tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(prepare_cases(cases, CONFIG, tmp_path)) == 2


def test_damage_is_named(cases, tmp_path: Path) -> None:
    prepare_cases(cases, CONFIG, tmp_path)
    victim = next(tmp_path.glob("*/images.npy"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{victim.parent}: damaged"):
        prepare_cases(cases, CONFIG, tmp_path)


class Harm:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(cases, tmp_path: Path) -> None:
    prepare_cases(cases, CONFIG, tmp_path / "cache")
    victim = next((tmp_path / "cache").glob("*/images.npy"))
    np.save(victim, np.array([Harm(tmp_path / "harm")], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=f"{victim.parent}: damaged"):
        prepare_cases(cases, CONFIG, tmp_path / "cache")
    assert not (tmp_path / "harm").exists()
    np.load(victim, allow_pickle=True)
    assert (tmp_path / "harm").exists()  # it would have done harm


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", lambda a: a[:-1]),
        ("images", lambda a: a.astype(np.float64)),
        ("boxes", lambda a: a[:, :3]),
        ("lung", lambda a: a[..., :-1]),
        ("infection", lambda a: a[0]),
    ],
)
def test_arrays_that_do_not_fit_are_named(cases, tmp_path: Path, name: str, change) -> None:
    prepare_cases(cases, CONFIG, tmp_path)
    victim = next(tmp_path.glob(f"*/{name}.npy"))
    np.save(victim, change(np.load(victim)))
    with pytest.raises(InputError, match=f"{victim.parent}: damaged \\(arrays of"):
        prepare_cases(cases, CONFIG, tmp_path)


def test_without_infection_mask(cases, tmp_path: Path) -> None:
    (prepared,) = prepare_cases([dataclasses.replace(cases[0], infection_mask=None)], CONFIG, tmp_path)
    assert prepared.infection is None
    assert prepared.lung.any()


def test_a_store_that_cannot_be_written(cases, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        prepare_cases(cases, CONFIG, tmp_path / "file" / "cache")
