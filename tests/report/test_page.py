"""The page of a scan, without a browser."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resunet_jax.errors import InputError
from resunet_jax.report.markup import DISCLAIMER, json_block, number
from resunet_jax.report.page import write_preview, write_scan_page
from resunet_jax.report.slices import HU_LOWEST, HU_STEP, Bytes2D, choose_sampling, encode_slices, pack
from tests.report.example import HOSTILE, SIZE_MM, encode, example_arrays, example_report, example_slices


def unpack(data: bytes, shape: tuple[int, int]) -> Bytes2D:
    """Pixel by pixel, as the page does it."""
    residuals = np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape)
    values = np.zeros((shape[0] + 1, shape[1] + 1), int)
    for r, c in np.ndindex(shape):
        left, above, corner = (int(v) for v in (values[r + 1, c], values[r, c + 1], values[r, c]))
        low, high = min(left, above), max(left, above)
        guess = low if corner >= high else high if corner <= low else left + above - corner
        values[r + 1, c + 1] = (guess + int(residuals[r, c])) & 255
    return values[1:, 1:].astype(np.uint8)


def page(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "scan_1_report.html"
    write_scan_page(path, example_report(**changes), example_slices(), SIZE_MM)
    return path.read_text(encoding="utf-8")


def from_base85(text: str) -> bytes:
    return base64.b85decode(text.translate(str.maketrans(",.:", "&<>")))


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 11)])
def test_packing_is_lossless(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for plane in (rng.integers(0, 256, shape), np.full(shape, 255), rng.integers(0, 2, shape) * 255):
        np.testing.assert_array_equal(unpack(pack(plane.astype(np.uint8)), shape), plane)


def test_levels_are_within_half_a_step() -> None:
    hu = np.linspace(-1350, 1200, 511, dtype=np.float32).reshape(7, 73, 1)
    empty = np.zeros(hu.shape, np.uint8)
    (one,) = encode(hu=hu, lung=empty, infection=empty > 0)
    shown = one.planes()["ct"] * float(HU_STEP) + HU_LOWEST
    assert np.abs(shown - hu[..., 0]).max() <= HU_STEP / 2
    (clipped,) = encode(hu=np.where(hu > 0, 9000, -9000).astype(np.float32), lung=empty, infection=empty > 0)
    assert set(np.unique(clipped.planes()["ct"])) == {0, 255}


def test_a_page_holds_the_very_voxels(tmp_path: Path) -> None:
    arrays = example_arrays()
    uncertainty = np.linspace(0, 100, arrays["hu"].size).astype(np.uint8).reshape(arrays["hu"].shape)
    with (tmp_path / "planes").open("w+b") as file:
        slices = [
            one
            for k in range(0, 12, 5)
            for one in encode_slices(
                **{key: a[..., k : k + 5] for key, a in {**arrays, "uncertainty": uncertainty}.items()}, file=file
            )
        ]
        write_scan_page(tmp_path / "a.html", example_report(), slices, SIZE_MM)
        assert file.tell() == 3 * arrays["hu"].size
    data = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    grid = np.ix_(data["rows"], data["columns"])
    shape = (len(data["rows"]), len(data["columns"]))
    assert len(data["planes"]["ct"]) == 12
    assert data["start"] == 6  # the first with most infection
    cut = arrays["infection"].sum(axis=(1, 2))
    assert cut[data["row"]] == cut[data["rows"]].max() > 0
    for k in (0, 4, 5, 11):
        ct, masks, extra = (
            unpack(from_base85(data["planes"][name][k]), shape) for name in ("ct", "masks", "uncertainty")
        )
        assert np.abs(ct * 10.0 - 1350 - arrays["hu"][..., k][grid]).max() <= 5
        np.testing.assert_array_equal(masks & 3, arrays["lung"][..., k][grid])
        np.testing.assert_array_equal(masks & 4 > 0, arrays["infection"][..., k][grid])
        np.testing.assert_array_equal(extra, uncertainty[..., k][grid])
    coronal = unpack(from_base85(data["coronal"]["masks"]), (12, shape[1]))
    np.testing.assert_array_equal(coronal[::-1].T & 3, arrays["lung"][data["row"]][data["columns"]])
    ct = unpack(from_base85(data["coronal"]["ct"]), (12, shape[1]))  # from the head to the feet
    assert np.abs(ct[::-1].T * 10.0 - 1350 - arrays["hu"][data["row"]][data["columns"]]).max() <= 5


def test_the_head_is_above_and_the_feet_are_below(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert "M0 10.1h16.7v.8H0z" in html  # slice 1 of 12, with a sixth of the most infection
    assert "Axial slices 12, 11, 10" in html


def test_the_body_is_cropped_and_no_mask_is_cut() -> None:
    arrays = example_arrays(rows=600, columns=700, slices=2)
    arrays["hu"][560:562] = 200  # a thin table
    sampling = choose_sampling(encode(**arrays))
    assert sampling.rows[0] > 40
    assert sampling.rows[-1] < 560
    assert 256 <= len(sampling.columns) <= 320
    assert len(np.unique(sampling.columns)) == len(sampling.columns)
    arrays["infection"][2:30, 10:50] = True
    sampling = choose_sampling(encode(**arrays))
    assert sampling.rows[0] <= 3
    assert sampling.columns[0] <= 11


def test_the_box_is_that_of_the_body_and_not_of_a_cushion() -> None:
    hu = np.full((120, 100, 1), -1000, np.float32)
    hu[10:40] = -700
    hu[50:90, 20:70] = 40
    (one,) = encode(hu=hu, lung=np.zeros(hu.shape, np.uint8), infection=np.zeros(hu.shape, bool))
    assert one.box == (50, 90, 20, 70)


def test_all_that_is_body_in_any_slice_is_shown() -> None:
    hu = np.full((60, 80, 2), -1000, np.float32)
    hu[10:20, 5:30, 0] = 40
    hu[25:50, 20:70, 1] = 40
    sampling = choose_sampling(encode(hu=hu, lung=np.zeros(hu.shape, np.uint8), infection=np.zeros(hu.shape, bool)))
    np.testing.assert_array_equal(sampling.rows, range(10, 50))
    np.testing.assert_array_equal(sampling.columns, range(5, 70))


@pytest.mark.parametrize("value", [-1000.0, 3000.0])
def test_an_empty_scan_has_a_page(tmp_path: Path, value: float) -> None:
    hu = np.full((30, 40, 1), value, np.float32)
    slices = encode(hu=hu, lung=np.zeros(hu.shape, np.uint8), infection=np.zeros(hu.shape, bool))
    write_scan_page(
        tmp_path / "a.html", example_report(by_slice={"lung_ml": [0.0], "infection_ml": [0.0]}), slices, (1, 2, 5)
    )
    assert len(data_of((tmp_path / "a.html").read_text(encoding="utf-8"))["rows"]) == 30


def test_a_noisy_scan_of_300_slices_stays_below_15_mb(tmp_path: Path) -> None:
    arrays = example_arrays(rows=512, columns=512, slices=60)
    arrays["hu"] += np.random.default_rng(1).normal(0, 30, arrays["hu"].shape).astype(np.float32)
    slices = encode(**arrays)
    sampling = choose_sampling(slices * 5)
    assert len(sampling.columns) >= 256
    write_scan_page(tmp_path / "a.html", example_report(slices=30), (slices * 5)[::10], SIZE_MM)
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    montage = len(html) - len(json.dumps(data_of(html)["planes"]))
    packed = sum(len(pack(sampling(p))) for s in slices[::5] for p in s.planes().values()) / 12
    assert montage + 300 * packed * 5 / 4 < 15e6


def test_strings_are_escaped(tmp_path: Path) -> None:
    lobes = {HOSTILE: {"percent": None, "grade": None, "lung_ml": 1.0, "infection_ml": 0.0}, "score": 7}
    html = page(
        tmp_path,
        name=HOSTILE,
        warnings=[HOSTILE],
        notes=[HOSTILE],
        models={HOSTILE: HOSTILE},
        settings={"$name": "$data"},
        version=HOSTILE,
        lobes=lobes,
    )
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x") >= 8
    assert html.count("</script>") == 2
    assert "$data" in html
    assert "7 of 5" in html


def test_json_cannot_leave_its_block() -> None:
    block = json_block({HOSTILE: ["<!--", "\u2029", "é"]})
    assert not set(block) & set("<>&\u2028\u2029")
    assert json.loads(block) == {HOSTILE: ["<!--", "\u2029", "é"]}
    with pytest.raises(ValueError, match="JSON"):
        json_block(float("nan"))


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    html = page(tmp_path)
    outside_data = re.sub(r'base64,[^"]*|id="data">.*?<', "", html)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", outside_data)
    assert not re.findall(r'\s(?:src|href)="(?!data:)', html)
    assert not re.search(r"\sstyle=|\son[a-z]+=", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"unsafe|\*|http", policy[1])


def test_it_can_be_read_without_a_script(tmp_path: Path) -> None:
    html = page(tmp_path, warnings=["Only 12 slices."])
    assert html.count(DISCLAIMER) >= 2
    assert "Left and right follow the header of the scan" in html
    assert '<img src="data:image/png;base64,' in html
    assert "Only 12 slices." in html
    assert "12.6\N{NO-BREAK SPACE}%" in html
    assert "<td>–</td>" in html
    assert "runs/infection" in html
    assert 'id="static" aria-label="Slices">' in html
    assert 'id="viewer" aria-label="Viewer" hidden>' in html


@pytest.mark.parametrize("shape", [(1, 512, 3), (2, 512, 1), (512, 1, 2)])
def test_a_scan_of_few_rows_has_a_preview(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    hu = np.full(shape, -1000.0, np.float32)
    slices = encode(hu=hu, lung=np.zeros(shape, np.uint8), infection=np.zeros(shape, bool))
    write_preview(tmp_path / "a.png", slices, (0.1, 5.0))
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) >= 1


def test_numbers_as_text() -> None:
    assert number(None) == number(float("nan")) == number("x") == "–"
    assert number(-412.4, 0, "HU") == "−412\N{NO-BREAK SPACE}HU"
    assert number(0.5) == "0.5"
    assert number(12345.678, 1) == "12\N{NARROW NO-BREAK SPACE}345.7"


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    arrays = example_arrays()
    with pytest.raises(ValueError, match="one shape"):
        encode(**{**arrays, "lung": arrays["lung"][1:]})
    with pytest.raises(ValueError, match="labels"):
        encode(**{**arrays, "lung": arrays["lung"] + 1})
    with pytest.raises(ValueError, match="one shape"):
        write_scan_page(tmp_path / "a.html", example_report(), [], SIZE_MM)
    with pytest.raises(ValueError, match="by slice"):
        write_scan_page(tmp_path / "a.html", example_report(slices=3), example_slices(), SIZE_MM)
    with pytest.raises(InputError, match="cannot be written"):
        write_scan_page(tmp_path / "none" / "a.html", example_report(), example_slices(), SIZE_MM)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ({"level": 0.8333, "guarantee": None}, " (83 %, estimate)"),
        ({"level": 0.9, "guarantee": 0.9}, " (90 %)"),
        (None, " (estimate)"),
    ],
)
def test_intervals_stand_beside_their_numbers_where_there_are_any(
    tmp_path: Path, interval: dict | None, said: str
) -> None:
    report = example_report(uncertainty={"members": 4, "pairwise_dice": 0.8412, "interval": interval})
    report["infection"] |= {"volume_interval_ml": [400.0, 700.25], "involvement_interval_percent": [8.0, 16.04]}
    path = tmp_path / "a.html"
    write_scan_page(path, report, example_slices(), SIZE_MM)
    html = path.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert f"12.6 %<small class=interval>8.0 to 16.0 %{said}</small>" in html
    assert f"543.2 ml<small class=interval>400.0 to 700.2 ml{said}</small>" in html
    assert "Agreement of 4 predictions" in html
    assert ">0.84<" in html
    without = page(tmp_path)
    assert " to 16.0" not in without
    assert "Agreement" not in without
