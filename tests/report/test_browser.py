"""The pages in a real Chromium, from disk, with every host name unresolvable."""

import base64
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resunet_jax.report.cohort import write_cohort_page
from resunet_jax.report.page import LAYERS, write_scan_page
from tests.report.example import HOSTILE, SIZE_MM, encode, example_arrays, example_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")

ARRAYS = example_arrays(slices=30)
INFECTION_ML = [float(k == 20) for k in range(30)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    switches = ("--headless=new", "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-dev-shm-usage")
    for switch in (*switches, "--window-size=1280,1400", "--force-color-profile=srgb"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    report = example_report(
        HOSTILE,
        30,
        warnings=[HOSTILE],
        by_slice={"lung_ml": INFECTION_ML, "infection_ml": INFECTION_ML},
        uncertainty={"interval": {"level": 0.83, "guarantee": None, "method": "CV+", "patients": 5}},
    )
    report["infection"] |= {"involvement_interval_percent": [0.0, 37.9], "volume_interval_ml": [0.0, 1491.6]}
    uncertainty = 100 * ARRAYS["infection"].astype(np.uint8)
    write_scan_page(folder / "scan.html", report, encode(**ARRAYS, uncertainty=uncertainty), SIZE_MM)
    volumes = {"b": 5.0, "a": None, "c": -2.0, "a10": 30.0, "a9": 30.5}
    reports = [example_report(name) for name in volumes]
    for one, volume in zip(reports, volumes.values(), strict=True):
        one["infection"]["involvement_percent"] = volume
        one["warnings"] = ["the lungs measure 12345 ml, where 800 to 9000 ml are plausible; check the masks"]
    write_cohort_page(folder / "index.html", reports)
    return folder


@pytest.fixture
def scan(browser: Any, folder: Path) -> Iterator[Any]:
    browser.get((folder / "scan.html").as_uri())
    wait(lambda: drawn(browser) == 20)
    yield browser
    assert browser.get_log("browser") == []


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "the page did not get there in 5 s"
        time.sleep(0.01)


def drawn(browser: Any) -> int:
    return int(browser.execute_script("return document.body.dataset.drawn ?? -1"))


def press(browser: Any, key: str, target: str = "document.activeElement") -> None:
    script = "{}.dispatchEvent(new KeyboardEvent('keydown', {{key: arguments[0], bubbles: true, cancelable: true}}))"
    browser.execute_script(script.format(target), key)


def pixels(browser: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Of the axial canvas: (rows, columns, RGBA)."""
    text = browser.execute_script(
        "const c = document.getElementById('axial');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = '';"
        "for (let i = 0; i < d.length; i += 8192) s += String.fromCharCode(...d.subarray(i, i + 8192));"
        "return [c.height, c.width, btoa(s)]"
    )
    return np.frombuffer(base64.b64decode(text[2]), np.uint8).reshape(text[0], text[1], 4)


def shown_grid(browser: Any) -> Any:
    data = browser.execute_script(
        "const d = JSON.parse(document.getElementById('data').textContent);return [d.rows,d.columns]"
    )
    return np.ix_(*data)


def test_it_opens_at_the_most_infected_slice(scan: Any) -> None:
    assert scan.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    assert scan.execute_script("return document.querySelector('.warnings li').textContent") == HOSTILE
    status = scan.execute_script("return document.getElementById('status').textContent")
    assert status == "21 of 30, infection 1.00 ml"
    assert scan.execute_script("return getComputedStyle(document.getElementById('static')).display") == "none"
    assert scan.execute_script("return document.getElementById('axial').getBoundingClientRect().width") >= 512
    entries = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert scan.execute_script(entries) == 0


@contextlib.contextmanager
def window(browser: Any, width: int, media: str = "screen") -> Iterator[None]:
    """A page of that width, as on a screen or on paper."""
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


OVERFLOWING = """
return [document.scrollingElement, ...document.querySelectorAll('.figures dd, .wide')]
  .filter(e => e.scrollWidth > e.clientWidth).map(e => e.outerHTML.slice(0, 200))
"""


@pytest.mark.parametrize("width", [360, 480, 600, 768, 900, 921, 1000, 1280])
def test_nothing_runs_out_of_its_place(scan: Any, width: int) -> None:
    with window(scan, width):
        assert scan.execute_script(OVERFLOWING) == []
        assert scan.find_element("id", "slice").size["width"] >= 150


@pytest.mark.parametrize("page", ["scan", "index"])
def test_all_of_it_is_printed(browser: Any, folder: Path, page: str) -> None:
    browser.get((folder / f"{page}.html").as_uri())
    with window(browser, 718, "print"):  # A4 in portrait
        assert browser.execute_script(OVERFLOWING) == []


def test_keys_change_the_slice(scan: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    active = scan.switch_to.active_element
    for key, expected in (
        (Keys.ARROW_UP, 21),
        (Keys.ARROW_DOWN, 20),
        (Keys.PAGE_DOWN, 10),
        (Keys.PAGE_UP, 20),
        (Keys.END, 29),
        (Keys.ARROW_UP, 29),
        (Keys.HOME, 0),
    ):
        active.send_keys(key)
        wait(lambda expected=expected: drawn(scan) == expected)  # type: ignore[misc]
    slider = scan.find_element("id", "slice")
    slider.send_keys(Keys.ARROW_RIGHT)
    wait(lambda: drawn(scan) == 1)
    slider.send_keys(Keys.PAGE_UP)
    wait(lambda: drawn(scan) == 11)


def test_the_wheel_and_a_click_change_the_slice(scan: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    origin = ScrollOrigin.from_element(scan.find_element("id", "axial"))
    ActionChains(scan).scroll_from_origin(origin, 0, 120).perform()
    wait(lambda: drawn(scan) == 19)
    for part in ("bars", "coronal"):
        box = scan.find_element("id", part)
        ActionChains(scan).move_to_element_with_offset(box, 0, -box.size["height"] // 2 + 3).click().perform()
        wait(lambda: drawn(scan) >= 28)
        press(scan, "Home", "document.body")
        wait(lambda: drawn(scan) == 0)


@pytest.mark.parametrize(("key", "level", "width"), [("1", -600, 1500), ("2", 40, 400)])
def test_shown_values_are_those_of_the_scan(scan: Any, key: str, level: int, width: int) -> None:
    press(scan, "m")
    press(scan, key)
    shown = pixels(scan)
    assert (shown[..., 0] == shown[..., 1]).all()
    assert (shown[..., 3] == 255).all()
    hu = level + width * (shown[..., 0] / 255 - 0.5)
    truth = np.clip(ARRAYS["hu"][..., 20][shown_grid(scan)], level - width / 2, level + width / 2)
    assert np.abs(hu - truth).max() <= 5 + width / 255 / 2 + 1e-3


def test_shown_masks_are_those_of_the_scan(scan: Any) -> None:
    scan.execute_script(
        "const o = document.getElementById('opacity'); o.value = 100; o.dispatchEvent(new Event('input'))"
    )
    lung, infection = (ARRAYS[name][..., 20][shown_grid(scan)] for name in ("lung", "infection"))
    truth = {"left": lung == 1, "right": lung == 2, "infection": infection, "uncertainty": infection}
    press(scan, "m")
    for layer in LAYERS:
        switch = scan.find_element("css selector", f"[data-layer={layer.id}]")
        switch.click()
        shown = (pixels(scan)[..., :3] == layer.color).all(-1)
        np.testing.assert_array_equal(shown, truth[layer.id])
        press(scan, layer.key)
        assert not switch.is_selected()
        assert not (pixels(scan)[..., :3] == layer.color).all(-1).any()


def test_the_pointer_reads_the_value_of_its_voxel(scan: Any) -> None:
    """Rows and columns are counted from 1, as slices are."""
    scan.execute_script(
        "const c = document.getElementById('axial'), b = c.getBoundingClientRect();"
        "const at = {clientX: b.left + 2.5 * b.width / c.width, clientY: b.top + 1.5 * b.height / c.height};"
        "c.dispatchEvent(new PointerEvent('pointermove', {...at, bubbles: true}))"
    )
    rows, columns = (axis.ravel() for axis in shown_grid(scan))
    text = scan.find_element("id", "readout").text
    assert text.startswith(f"row {rows[1] + 1}, column {columns[2] + 1}: ")
    for k in (20, 21):  # the pointer stays where it is
        hu = float(scan.find_element("id", "readout").text.split(": ")[1].removesuffix(" HU").replace("−", "-"))
        assert abs(hu - ARRAYS["hu"][rows[1], columns[2], k]) <= 5
        press(scan, "ArrowUp", "document.body")
        wait(lambda k=k: drawn(scan) == k + 1)  # type: ignore[misc]
    scan.execute_script("document.getElementById('axial').dispatchEvent(new PointerEvent('pointerleave'))")
    assert scan.find_element("id", "readout").text == ""


def test_outlines_and_windows_change_pixels(scan: Any) -> None:
    before = pixels(scan)
    scan.find_element("css selector", "[data-level='40']").click()
    other = pixels(scan)
    assert (before != other).any()
    press(scan, "o")
    assert (other != pixels(scan)).any()
    pressed = scan.execute_script(
        "return [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.level)"
    )
    assert pressed == ["40"]


def test_without_a_script_it_shows_pictures_and_numbers(browser: Any, folder: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((folder / "scan.html").as_uri())
        assert not browser.find_element("id", "viewer").is_displayed()
        assert browser.find_element("css selector", "#static img").is_displayed()
        assert "Involvement by region" in browser.find_element("tag name", "main").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_index_sorts(browser: Any, folder: Path) -> None:
    def names() -> list[str]:
        found: list[str] = browser.execute_script(
            "return [...document.querySelectorAll('tbody a')].map(a => a.textContent)"
        )
        return found

    browser.get((folder / "index.html").as_uri())
    assert names() == ["b", "a", "c", "a10", "a9"]
    scan, involved = (browser.find_elements("css selector", "thead button")[i] for i in (0, 4))
    scan.click()
    assert names() == ["a", "a9", "a10", "b", "c"]
    involved.send_keys("\ue007")  # Enter
    assert names() == ["a9", "a10", "b", "c", "a"]
    involved.click()
    assert names() == ["c", "b", "a10", "a9", "a"]
    orders = browser.execute_script("return [...document.querySelectorAll('[aria-sort]')].map(h => h.ariaSort)")
    assert orders == ["ascending"]
    assert browser.get_log("browser") == []
