import dataclasses
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data import slice_cache
from resunet_jax.data.cases import find_cases
from resunet_jax.data.preprocess import air_level, air_offset, prepare_slice, prepare_volume, slice_box
from resunet_jax.data.readers import open_scan, read_mask, read_volume
from resunet_jax.data.slice_cache import content_digests, prepare_cases
from resunet_jax.data.volume import Volume, hu_to_window
from resunet_jax.errors import InputError

CONFIG = PreprocessConfig(image_size=32, normalization="window")
AIR = dataclasses.replace(CONFIG, normalization="air")


@pytest.fixture
def cases(phantom: Path):
    return find_cases(phantom)[:2]


def test_slices_are_those_of_the_scan(cases, tmp_path: Path) -> None:
    prepared = prepare_cases(cases, CONFIG, tmp_path)[1]
    volume = read_volume(cases[1].ct)
    for k in range(volume.values.shape[-1]):
        image, box = prepare_slice(volume, k, CONFIG, 0.0), slice_box(volume, k, CONFIG)
        np.testing.assert_array_equal(prepared.images[k, ..., 0], image)
        np.testing.assert_array_equal(prepared.boxes[k], box)
    assert prepared.images.dtype == np.float32
    assert 0 <= prepared.images.min() < prepared.images.max() <= 1
    assert set(np.unique(prepared.lung)) == set(np.unique(prepared.infection)) == {0, 1}
    assert isinstance(prepared.images, np.memmap)


@pytest.mark.parametrize("name", ["é" * 124, "a\udce9"])  # the second is of no text, as on a disk of another encoding
def test_a_case_may_have_any_name_that_a_file_can_have(cases, tmp_path: Path, name: str) -> None:
    long = dataclasses.replace(cases[0], id=name)
    (first,), (again,) = (prepare_cases([long], CONFIG, tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first.images, again.images)


def test_masks_cover_what_they_did(cases, tmp_path: Path) -> None:
    prepared = prepare_cases(cases, CONFIG, tmp_path)[0]
    volume = read_volume(cases[0].ct)
    lung = read_mask(cases[0].lung_mask, cases[0].ct, volume.grid) > 0
    pixels = prepared.boxes[:, 2] * prepared.boxes[:, 3] / CONFIG.image_size**2
    np.testing.assert_allclose((prepared.lung[..., 0].sum(axis=(1, 2)) * pixels).sum(), lung.sum(), rtol=0.02)


def test_second_time_nothing_is_read(cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_cases(cases, CONFIG, tmp_path)
    monkeypatch.setattr(slice_cache, "read_volume", lambda *_: pytest.fail("read again"))
    second = prepare_cases(cases, CONFIG, tmp_path)
    np.testing.assert_array_equal(first[0].images, second[0].images)


def test_settings_and_content_make_the_key(cases, tmp_path: Path) -> None:
    prepare_cases(cases, CONFIG, tmp_path)
    prepare_cases(cases, dataclasses.replace(CONFIG, normalization="minmax"), tmp_path)
    other = dataclasses.replace(cases[0], lung_mask=cases[0].infection_mask)
    prepare_cases([other], CONFIG, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.name[0] != "."]) == 5


def test_each_file_of_a_case_is_part_of_its_digest(cases) -> None:
    case, other = cases
    changes = ({"ct": other.ct}, {"lung_mask": other.lung_mask}, {"infection_mask": other.infection_mask})
    changed = [dataclasses.replace(case, **change) for change in (*changes, {"infection_mask": None})]
    assert len({content_digests([one])[case.id] for one in (case, *changed)}) == 5


def test_an_interrupted_build_is_not_taken_for_a_complete_one(
    cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(slice_cache, "prepare_mask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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


def test_a_cache_that_cannot_be_written(cases, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        prepare_cases(cases, CONFIG, tmp_path / "file" / "cache")


def a_body(slices: int = 4, padding: int = 6) -> np.ndarray:
    """HU (64, 64, slices): fat around two lungs, noisy air around it, and nothing where the scanner does not see."""
    hu = np.full((64, 64, slices), -1000.0)
    hu[16:56, 12:52] = -100
    hu[20:40, 16:28] = hu[20:40, 34:46] = -850
    hu += np.random.default_rng(0).normal(0, 10, hu.shape)
    hu[:padding] = hu[:, :padding] = -2000
    return hu


def exported(hu: np.ndarray, low: float) -> Volume:
    """As a file in 0..255 over HU [low, low + 1500]."""
    values = np.rint(np.clip((hu - low) / 1500, 0, 1) * 255).astype(np.uint8)
    return Volume(values, "windowed", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("low", [-1350.0, -1250.0, -1150.0])
def test_air_reveals_the_window_that_a_scan_was_exported_with(low: float) -> None:
    scan = exported(a_body(), low)
    assert air_offset(scan, AIR) == pytest.approx((low + 1250) / 1500, abs=1.5 / 255)
    images, _ = prepare_volume(scan, AIR)
    expected, _ = prepare_volume(Volume(a_body(), "hu", scan.grid), AIR)
    inside = expected > 0.1  # the field of view; outside of it a shifted scan need not be 0
    np.testing.assert_allclose(images[inside], expected[inside], atol=2 / 255)
    assert inside.mean() > 0.9


def test_no_offset_where_none_is_asked_for_or_no_air_is_seen() -> None:
    hu = a_body()
    scan = exported(hu, -1350)
    assert air_offset(scan, CONFIG) == 0
    assert air_offset(Volume(hu - 100, "hu", scan.grid), AIR) == 0
    all_body = exported(np.full((64, 64, 4), 0.0), -1350)
    assert air_offset(all_body, AIR) == 0
    nothing_around = np.where(a_body() < -950, -2000, hu)
    assert air_offset(exported(nothing_around, -1350), AIR) == 0
    assert air_level(all_body, AIR) is None
    assert air_level(scan, AIR) == pytest.approx(350 / 1500, abs=1.5 / 255)


def test_some_slices_are_prepared_as_in_the_whole_scan(tmp_path: Path) -> None:
    hu = a_body(slices=40)
    hu[..., ::2] += 30  # slices differ
    scan = exported(hu, -1350)
    nib.Nifti1Image(scan.values, np.diag([-1, -1, 1, 1])).to_filename(tmp_path / "scan.nii")
    whole, _ = prepare_volume(read_volume(tmp_path / "scan.nii"), AIR)
    with open_scan(tmp_path / "scan.nii") as opened:
        np.testing.assert_array_equal(
            opened.sample_slices(5).values, read_volume(tmp_path / "scan.nii").sample_slices(5).values
        )
        assert opened.sample_slices(5).values.shape[-1] == 5
        some, _ = prepare_volume(opened.read_slices(5, 7), AIR, air_offset(opened, AIR))
    np.testing.assert_array_equal(some, whole[5:7])


def test_the_same_scan_from_two_windows_is_the_same_to_a_model() -> None:
    """What the offset is for: at -850 HU, two exports are a tenth of the scale apart without it."""
    images = {
        config.normalization: [prepare_volume(exported(a_body(), low), config)[0] for low in (-1350, -1250)]
        for config in (CONFIG, AIR)
    }
    lung = [np.median(image[:, 8:16, 6:10]) for image in images["air"]]
    assert lung == pytest.approx([hu_to_window(-850)] * 2, abs=2 / 255)
    apart = [np.abs(first - second).mean() for first, second in images.values()]
    assert apart[1] < 0.1 * apart[0]


GB = 1e-9  # a byte


def size(cache: Path) -> int:
    return sum(file.stat().st_size for file in cache.glob("*/*.npy"))


def made(cache: Path) -> list[str]:
    """Names of the scans in the cache, used longest ago first; each use is dated a second after the one before."""
    folders = sorted((path.parent for path in cache.glob("*/boxes.npy")), key=lambda path: path.stat().st_mtime)
    for i, folder in enumerate(folders):
        os.utime(folder, (1e9 + i, 1e9 + i))
    return [folder.name for folder in folders]


@pytest.fixture
def full_cache(cases, tmp_path: Path) -> tuple[Path, int]:
    """A cache of three settings of two scans that nobody uses, and its size in bytes; the first setting used last."""
    for image_size in (16, 32, 48):
        for case in cases:
            prepare_cases([case], dataclasses.replace(CONFIG, image_size=image_size), tmp_path)
            made(tmp_path)
    prepare_cases(cases, dataclasses.replace(CONFIG, image_size=16), tmp_path)
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "program-cache").write_bytes(bytes(10**6))
    return tmp_path, size(tmp_path)


def test_the_scans_used_longest_ago_are_removed(full_cache, cases, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cache, total = full_cache
    kept = made(cache)
    prepare_cases(cases, dataclasses.replace(CONFIG, image_size=16), cache, max_cache_gb=total * GB)
    assert (made(cache), caplog.records) == (kept, [])
    prepare_cases(cases, dataclasses.replace(CONFIG, image_size=16), cache, max_cache_gb=(total - 1) * GB)
    assert set(kept) - set(made(cache)) == {kept[0]}
    (record,) = caplog.records
    assert re.fullmatch(rf"{cache}: removed the slices of 1 scans, used longest ago; .*`max_cache_gb`", record.message)
    prepare_cases(cases, dataclasses.replace(CONFIG, image_size=16), cache, max_cache_gb=0)
    assert made(cache) == kept[-2:]  # what the call itself uses
    assert (cache / "compiled" / "program-cache").is_file()
    assert not [path for path in cache.iterdir() if path.name.startswith(".partial")]


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b"])
def test_a_case_in_use_stays_whatever_its_name(cases, tmp_path: Path, name: str) -> None:
    (prepared,) = prepare_cases([dataclasses.replace(cases[0], id=name)], CONFIG, tmp_path, max_cache_gb=0)
    assert np.isfinite(prepared.images).all()
    assert len(made(tmp_path)) == 1


def test_no_scan_that_is_in_use_is_removed(full_cache, cases) -> None:
    """By this process, and by another one until it is killed."""
    cache, _ = full_cache
    ours = prepare_cases(cases, dataclasses.replace(CONFIG, image_size=48), cache)
    code = (
        "import sys, dataclasses; from pathlib import Path\n"
        "from resunet_jax.config import PreprocessConfig\n"
        "from resunet_jax.data.cases import find_cases\n"
        "from resunet_jax.data.slice_cache import content_digests, prepare_cases\n"
        "cases = find_cases(Path(sys.argv[1]))[:2]\n"
        "config = PreprocessConfig(image_size=32, normalization='window')\n"
        "prepared = prepare_cases(cases, config, Path(sys.argv[2]))\n"
        "print(prepared[0].digest, prepared[1].digest, flush=True)\n"
        "sys.stdin.read()\n"
    )
    data = cases[0].ct.parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", code, data, cache], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        theirs = other.stdout.readline().split()
        prepare_cases(cases[:1], dataclasses.replace(CONFIG, image_size=16), cache, max_cache_gb=0)
        left = {one.digest for one in ours} | set(theirs)
        assert len(left) == 4
        assert left < set(made(cache))
        other.kill()
    images = ours[0].images.copy()
    del ours
    prepare_cases(cases[:1], dataclasses.replace(CONFIG, image_size=16), cache, max_cache_gb=0)
    assert len(made(cache)) == 1
    again = prepare_cases(cases, dataclasses.replace(CONFIG, image_size=48), cache)
    np.testing.assert_array_equal(again[0].images, images)
    assert len(list((cache / ".in_use").glob("*.lock"))) <= 3  # of the living, and the one of all


def test_a_cache_that_can_only_be_read_serves(cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_cases(cases, CONFIG, tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(slice_cache.FileLock, "acquire", refuse)
    monkeypatch.setattr(slice_cache, "write_text", refuse)
    second = prepare_cases(cases, CONFIG, tmp_path, max_cache_gb=0)
    np.testing.assert_array_equal(first[0].images, second[0].images)
