import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.data.cases import find_cases
from resunet_jax.data.grey_slices import SPACING_MM, estimate_hu, import_grey_slices
from resunet_jax.errors import InputError
from tests.conftest import run_script

LUNG, BODY, LESION, AIR = 60, 160, 110, 20


def arrays(count: int = 5) -> dict[str, np.ndarray]:
    """Slices of two cases: air around a body, and in it a lung with a lesion that is nearer to the front."""
    image = np.full((count, 32, 40), AIR, np.uint8)
    image[:, 4:28, 4:36] = BODY
    lung, infection = np.zeros(image.shape, bool), np.zeros(image.shape, bool)
    lung[:, 6:26, 8:30] = True
    infection[:, 8:12, 10:20] = True
    image[lung] = LUNG
    image[infection] = LESION
    return {"image": image, "lung": lung, "infection": infection, "case": np.array(["a", "a", "b", "b", "b"])[:count]}


def saved(folder: Path, **changes: Any) -> Path:
    values = {name: value for name, value in {**arrays(), **changes}.items() if value is not None}
    np.savez(folder / "slices.npz", **values)
    return folder / "slices.npz"


def test_lung_and_soft_tissue_get_their_hounsfield_units() -> None:
    one = {name: array[0] for name, array in arrays().items() if name != "case"}
    hu = estimate_hu(**one)
    assert hu.dtype == np.float32
    levels = [hu[one["image"] == level] for level in (LUNG, BODY, LESION, AIR)]
    for found, expected in zip(levels, (-815, 55, -380, -1163), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.01)


def test_soft_tissue_of_a_slice_that_is_stretched_over_its_bones() -> None:
    """Muscle is darker than in an equalised one, and bone may be the larger part of what is bright."""
    one = {name: array[0] for name, array in arrays().items() if name != "case"}
    image = np.select([one["image"] == level for level in (LUNG, BODY, LESION)], [10, 95, 50], 0).astype(np.uint8)
    image[4:6, 4:36] = 200
    hu = estimate_hu(**{**one, "image": image})
    np.testing.assert_allclose([hu[image == level][0] for level in (10, 95)], [-815, 55], atol=0.01)


def test_a_lung_that_is_infected_throughout_is_taken_as_a_whole() -> None:
    one = {name: array[0] for name, array in arrays().items() if name != "case"}
    everywhere = {**one, "infection": one["lung"]}
    assert np.median(estimate_hu(**everywhere)[one["lung"]]) == -815


def test_little_contrast_is_not_stretched_and_nothing_leaves_the_scale() -> None:
    image = np.full((16, 16), 115, np.uint8)
    image[:4], image[15], lung = 111, 255, np.zeros((16, 16), bool)
    lung[:4] = True
    hu = estimate_hu(image, lung, lung & False)
    np.testing.assert_allclose(hu[8], -815 + 4 * 870 / 20)
    assert (hu[15] == 1000).all()
    white = np.where(lung, 255, 0).astype(np.uint8)
    np.testing.assert_allclose(estimate_hu(white, lung, lung & False)[:4], -815)
    nothing_else = estimate_hu(np.where(lung, 55, 0).astype(np.uint8), lung, lung & False)
    np.testing.assert_allclose(nothing_else[:4], -815)
    np.testing.assert_allclose(nothing_else[8], -815 - 55 * 870 / 200)


def test_lesions_and_bone_do_not_move_the_scale() -> None:
    image, lung = np.full((40, 60), 160, np.uint8), np.zeros((40, 60), bool)
    lung[5:35, 5:50] = True
    infection = np.zeros_like(lung)
    infection[5:35, 5:40] = True
    image[lung], image[infection], image[36:], image[0] = 60, 130, 250, 0
    hu = estimate_hu(image, lung, infection)
    np.testing.assert_allclose(hu[20, 45], -815, atol=0.01)
    np.testing.assert_allclose(hu[2, 30], 55, atol=0.01)
    few = lung & (np.arange(60) >= 46)
    np.testing.assert_allclose(estimate_hu(image, lung, lung & ~few)[20, 20], -815, atol=0.01)
    dark = np.where(image == 0, 0, np.maximum(image, 120)).astype(np.uint8)
    assert estimate_hu(dark, lung, infection)[0, 0] == -1250


def test_masks_may_be_labels_of_any_width(tmp_path: Path) -> None:
    given = {name: array if name == "case" else array[..., :36] for name, array in arrays().items()}
    labels = {"lung": -given["lung"].astype(np.int8), "infection": given["infection"] * 2.0}
    bits = {name: np.packbits(given[name], axis=-1) for name in labels}
    for number, masks in enumerate((labels, bits)):
        import_grey_slices(saved(tmp_path, **{**given, **masks}), tmp_path / str(number))
        for folder, name in (("lung_mask", "lung"), ("infection_mask", "infection")):
            found = np.asarray(nib.load(tmp_path / str(number) / folder / "a.nii.gz").dataobj)
            np.testing.assert_array_equal(found.transpose(2, 1, 0), given[name][:2])


@pytest.mark.parametrize("packed", [False, True])
def test_slices_become_a_data_set(tmp_path: Path, packed: bool) -> None:
    given = arrays()
    bits = {name: np.packbits(given[name], axis=-1) for name in ("lung", "infection")} if packed else {}
    flags = (f"--input={saved(tmp_path, **bits)}", f"--output_dir={tmp_path / 'data'}", "--flipped=b")
    result = run_script("import_slices", *flags)
    assert (result.returncode, result.stdout.startswith("2 cases, ")) == (0, True), result.stderr
    assert json.loads((tmp_path / "data" / "split.json").read_text()) == {"train": ["a", "b"], "val": [], "test": []}
    cases = find_cases(tmp_path / "data")
    assert [case.id for case in cases] == ["a", "b"]
    for case, own in zip(cases, (slice(0, 2), slice(2, 5)), strict=True):
        assert case.infection_mask is not None
        images = [nib.load(path) for path in (case.ct, case.lung_mask, case.infection_mask)]
        hu, lung, infection = (np.asarray(image.dataobj).transpose(2, 1, 0) for image in images)
        assert nib.aff2axcodes(images[0].affine) == ("L", "P", "S")
        np.testing.assert_allclose(images[0].header.get_zooms(), SPACING_MM)
        turned = slice(None, None, -1 if case.id == "b" else 1)
        np.testing.assert_array_equal(lung, given["lung"][own, turned])
        np.testing.assert_array_equal(infection, given["infection"][own, turned])
        np.testing.assert_array_equal(np.unique(hu[lung > infection]), [-815])
        assert (hu.dtype, lung.dtype, infection.dtype) == (np.int16, np.uint8, np.uint8)
    checked = run_script("check_data", f"--data_dir={tmp_path / 'data'}", "--assume=hu")
    assert "2 scans of 2 patients, 5 slices, 5 with infection" in checked.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lung": None}, "no .npz of image, lung, infection and case"),
        ({"case": np.array([None] * 5)}, "no .npz of image, lung, infection and case"),
        ({"image": arrays()["image"].astype(np.int16)}, "image is int16 (5, 32, 40)"),
        ({"image": arrays()["image"][0]}, "image is uint8 (32, 40)"),
        ({"case": np.arange(5)}, "case int64 (5,)"),
        ({"case": np.array(["a"])}, "they must be uint8 (slices, rows, columns) and a name for each slice"),
        ({"lung": arrays()["lung"][:, :4]}, "lung is bool (5, 4, 40); it must be of the shape of image, or packed"),
        ({"infection": arrays()["lung"][..., :5]}, "infection is bool (5, 32, 5)"),
        ({"lung": np.full((5, 32, 40), "yes")}, "lung is <U3 (5, 32, 40)"),
        ({"lung": np.full((5, 32, 40), np.nan)}, "lung has values that are NaN or infinite"),
        ({"image": 255 - arrays()["image"]}, "the lung is lighter than the chest wall in a (0), a (1), b (2)"),
        ({name: array[:0] for name, array in arrays().items()}, "no slice in it"),
        ({"case": np.array(["a", "a", "../b", "/b", "b/c"])}, "case '../b', '/b', 'b/c': a name has letters, digits"),
        (
            {"case": np.array(["", ".a", "a ", "a.nii", "Coronacases_1"])},
            "case '', '.a', 'a ', 'a.nii', 'Coronacases_1'",
        ),
        ({"lung": arrays()["lung"] & np.eye(5, dtype=bool)[0][:, None, None]}, "no lung in a (1), b (2), b (3), b (4)"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"slices\.npz: .*{re.escape(message)}"):
        import_grey_slices(saved(tmp_path, **changes), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_what_is_no_npz_or_is_there_already_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no numbers")
    np.save(tmp_path / "one.npy", np.zeros(3))
    whole = saved(tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez_compressed(tmp_path / "damaged.npz", **arrays())
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[80:90] = bytes(10)
    (tmp_path / "damaged.npz").write_bytes(content)
    encrypted = bytearray(whole)  # by the flag of each entry, in its own header and in the directory
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(re.escape(header), whole):
            encrypted[match.start() + flags] |= 1
    (tmp_path / "encrypted.npz").write_bytes(encrypted)
    for name in ("text.npz", "one.npy", "none.npz", "cut.npz", "damaged.npz", "encrypted.npz"):
        with pytest.raises(InputError, match=f"{name}: no .npz of image"):
            import_grey_slices(tmp_path / name, tmp_path / "data")
    with pytest.raises(InputError, match=r"`flipped`: .*slices\.npz has no case c; it has a, b"):
        import_grey_slices(saved(tmp_path), tmp_path / "data", ["c"])
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="data: exists already; choose a new `output_dir`"):
        import_grey_slices(saved(tmp_path), tmp_path / "data")
