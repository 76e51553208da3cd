import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.data.cases import find_cases
from resunet_jax.data.phantom import SMALL, PhantomConfig, make_phantom
from resunet_jax.data.readers import read_mask, read_volume
from resunet_jax.errors import InputError


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_files(tmp_path: Path) -> None:
    tiny = {"volumes": 2, "downsample": 16, "slices": 4}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_phantom(tmp_path / name, PhantomConfig(**tiny, seed=seed))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_more_volumes_are_of_further_patients_and_leave_the_first_as_they_are(tmp_path: Path) -> None:
    tiny = {"downsample": 32, "slices": 4}
    for name, volumes in (("few", 6), ("many", 32)):
        make_phantom(tmp_path / name, PhantomConfig(**tiny, volumes=volumes))
    cases = find_cases(tmp_path / "many")
    assert len(cases) == 32
    assert len({case.patient for case in cases}) == 30
    few, many = digests(tmp_path / "few"), digests(tmp_path / "many")
    assert {name: digest for name, digest in few.items() if many[name] != digest}.keys() == {"metadata.csv"}


def test_kaggle_layout(phantom: Path) -> None:
    lines = (phantom / "metadata.csv").read_text().splitlines()
    assert lines[0] == "ct_scan,lung_mask,infection_mask,lung_and_infection_mask"
    assert lines[1].startswith("../input/covid19-ct-scans/ct_scans/coronacases_org_001.nii,")
    cases = find_cases(phantom)
    assert len(cases) == SMALL.volumes
    assert {case.source for case in cases} == {"coronacases", "radiopaedia"}
    assert len({case.patient for case in cases}) == 5


def test_scans_differ_as_the_real_ones_do(phantom: Path) -> None:
    volumes = {case.id: read_volume(case.ct) for case in find_cases(phantom)}
    assert {volume.intensity_scale for volume in volumes.values()} == {"hu", "windowed"}
    assert len({nib.aff2axcodes(volume.grid.affine) for volume in volumes.values()}) >= 3
    assert len({volume.grid.spacing_mm for volume in volumes.values()}) == SMALL.volumes
    rows, columns, _ = volumes["radiopaedia_14_85914_0"].values.shape
    assert rows < columns


def test_masks_lie_in_the_anatomy(phantom: Path) -> None:
    """Infection inside the lung, left lung on the left, air in healthy lung, no lung in the outermost slices."""
    burdens = []
    for case in find_cases(phantom):
        volume = read_volume(case.ct)
        lung = read_mask(case.lung_mask, case.ct, volume.grid)
        infection = read_mask(case.infection_mask, case.ct, volume.grid) > 0
        combined_path = case.lung_mask.parent.parent / "lung_and_infection_mask" / case.lung_mask.name
        combined = read_mask(combined_path, case.ct, volume.grid)
        np.testing.assert_array_equal(combined, np.where(infection, 3, lung))
        assert not (infection & (lung == 0)).any()
        columns = np.arange(lung.shape[1])
        assert np.average(columns, weights=(lung == 1).sum(axis=(0, 2))) > np.average(
            columns, weights=(lung == 2).sum(axis=(0, 2))
        )
        values = np.stack([volume.normalize_hu(k) for k in range(lung.shape[2])], axis=-1)
        healthy, sick = values[(lung > 0) & ~infection].mean(), values[infection].mean()
        assert healthy < 0.4 < sick
        by_slice = lung.any(axis=(0, 1))
        assert not by_slice[0]
        assert not by_slice[-1]
        burdens.append(infection.sum() / (lung > 0).sum())
    assert min(burdens) < 0.01
    assert max(burdens) > 0.05


def test_a_threshold_is_not_enough(phantom: Path) -> None:
    """Air inside the body's box is not yet lung, and dense lung not yet infection."""
    lung_dice, infection_dice = [], []
    for case in find_cases(phantom):
        volume = read_volume(case.ct)
        lung = read_mask(case.lung_mask, case.ct, volume.grid) > 0
        infection = read_mask(case.infection_mask, case.ct, volume.grid) > 0
        values = np.stack([volume.normalize_hu(k) for k in range(lung.shape[2])], axis=-1)
        lung_dice.append(dice(values < 0.6, lung))
        infection_dice.append(dice((values > 0.4) & (values < 0.85), infection))
    assert max(lung_dice) < 0.6
    assert max(infection_dice) < 0.4


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize(
    "config",
    [PhantomConfig(volumes=1), PhantomConfig(volumes=101), PhantomConfig(slices=2), PhantomConfig(downsample=600)],
)
def test_senseless_settings(tmp_path: Path, config: PhantomConfig) -> None:
    with pytest.raises(InputError, match="2 to 100"):
        make_phantom(tmp_path / "set", config)


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        make_phantom(tmp_path, SMALL)
