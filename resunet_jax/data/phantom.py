"""A synthetic chest-CT set in the Kaggle layout: for trying things out and for tests, not for science.

Anatomy is drawn in mm and Hounsfield units, so that scans differ in field of view, spacing, orientation and intensity
scale as the real ones do: half are "coronacases" (HU, int16), half "radiopaedia" (windowed, uint8, other axes).
What a threshold would mistake for lung or infection is there too: trachea, stomach gas, vessels, dense posterior lung.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage

from resunet_jax.data.cases import KNOWN_CASES, identify
from resunet_jax.data.volume import HU_WINDOW, FloatArray
from resunet_jax.errors import InputError
from resunet_jax.files import atomic_dir, require_absent
from resunet_jax.progress import parallel_map

Floats = npt.NDArray[np.float64]

FOLDERS = ("ct_scans", "lung_mask", "infection_mask", "lung_and_infection_mask")
CASE_IDS = (
    *KNOWN_CASES,
    *(f"coronacases_{n:03d}" for n in range(11, 51)),
    *(f"radiopaedia_{n}_{85000 + n}_0" for n in range(101, 141)),
)
"""What scans are called: as in the full set, then as further patients of its sources."""

_PREFIX = "../input/covid19-ct-scans"
_NOT_SQUARE = "radiopaedia_14_85914_0"
_AXES = ("LPS", "RAS", "LAS", "RPI")
_HEIGHT_MM = 300.0
_MAX_DOWNSAMPLE = 64  # leaves 8 of 512 pixels


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """What to make.

    Attributes:
      volumes: number of scans, half of each source; from 2 to 100. Beyond 20 each is of a further patient.
      downsample: divides the in-plane size, 512 (coronacases) or 630 (radiopaedia) pixels; the anatomy keeps its size.
      slices: of a coronacases scan; a radiopaedia scan has three quarters of that.
      seed: the same seed gives the same files.
    """

    volumes: int = 10
    downsample: int = 1
    slices: int = 28
    seed: int = 0


SMALL = PhantomConfig(volumes=6, downsample=6, slices=12)
"""A variant that is made in seconds, for tests."""


@dataclasses.dataclass(frozen=True)
class _Lesion:
    centre: Floats
    radii: Floats
    hu: float


@dataclasses.dataclass(frozen=True)
class _Anatomy:
    """One person; lengths in mm, coordinates (left, posterior, superior) about the middle of the chest."""

    body: Floats
    fat: float
    lung_centre: Floats
    lung_axes: Floats
    base: float
    apex: float
    dome: float
    heart: Floats
    vessels: Floats  # (points, 4): position and radius
    bronchi: Floats
    lesions: tuple[_Lesion, ...]
    fields: FloatArray  # (3, z, y, x) smooth noise, standard deviation 1
    parenchyma_hu: float


def make_phantom(output_dir: Path, config: PhantomConfig) -> None:
    """Writes ct_scans/, the mask folders and metadata.csv; the folder appears when it is whole.

    Raises:
      InputError: the folder exists, cannot be written, or the config makes no sense.
    """
    if not (2 <= config.volumes <= len(CASE_IDS) and 1 <= config.downsample <= _MAX_DOWNSAMPLE and config.slices >= 4):
        raise InputError(
            f"{config}: expected 2 to {len(CASE_IDS)} volumes, downsample 1 to {_MAX_DOWNSAMPLE}, slices ≥ 4"
        )
    require_absent(output_dir, "`output_dir`")
    half = config.volumes // 2
    sources = ("coronacases", config.volumes - half), ("radiopaedia", half)
    ids = [case_id for source, count in sources for case_id in [c for c in CASE_IDS if c.startswith(source)][:count]]
    with atomic_dir(output_dir.absolute()) as partial:
        for folder in FOLDERS:
            (partial / folder).mkdir()
        parallel_map("drawing phantoms", lambda case_id: _write_case(partial, case_id, config), ids, 2)
        _write_metadata(partial / "metadata.csv", ids)


def _file_names(case_id: str) -> tuple[str, ...]:
    source, _, rest = case_id.partition("_")
    ct = f"coronacases_org_{rest}.nii" if source == "coronacases" else f"{source}_org_covid-19-pneumonia-{rest}-dcm.nii"
    return ct, *(f"{case_id}.nii" for _ in FOLDERS[1:])


def _write_metadata(path: Path, ids: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("ct_scan", "lung_mask", "infection_mask", "lung_and_infection_mask"))
        for case_id in ids:
            names = zip(FOLDERS, _file_names(case_id), strict=True)
            writer.writerow([f"{_PREFIX}/{folder}/{name}" for folder, name in names])


def _write_case(root: Path, case_id: str, config: PhantomConfig) -> None:
    _, source, patient = identify(case_id)
    order = CASE_IDS.index(case_id)
    # A person looks alike in every scan; the disease and the scanner need not.
    person = np.random.default_rng([config.seed, *patient.encode()])
    scan = np.random.default_rng([config.seed, order])
    windowed = source == "radiopaedia"
    size = (630 if windowed else 512) // config.downsample
    rows = 401 // config.downsample if case_id == _NOT_SQUARE else size
    slices = max(3, config.slices * 3 // 4) if windowed else config.slices
    field_mm = scan.uniform(390, 430)
    spacing = np.array([field_mm / size, field_mm / size, _HEIGHT_MM / slices])
    nearly_free = order % 5 == 1
    hu, lung, infection = draw_scan(person, scan, (rows, size, slices), spacing, nearly_free=nearly_free)
    if windowed:
        low, high = HU_WINDOW
        ct = np.rint((np.clip(hu, low, high) - low) / (high - low) * 255).astype(np.uint8)
    else:
        ct = np.rint(np.clip(hu, -1024, 3071)).astype(np.int16)
    combined = np.where(infection > 0, 3, lung).astype(np.uint8)
    axes = _AXES[order % 4] if windowed else "LPS"
    for folder, name, array in zip(FOLDERS, _file_names(case_id), (ct, lung, infection, combined), strict=True):
        write_nifti(root / folder / name, array, spacing, axes)


def write_nifti(path: Path, array: npt.NDArray[Any], spacing: Floats, axes: str) -> None:
    """Writes an array (rows to posterior, columns to left, slices to superior), with its axes in the order `axes`."""
    affine = np.zeros((4, 4))
    affine[1, 0], affine[0, 1], affine[2, 2], affine[3, 3] = -spacing[1], -spacing[0], spacing[2], 1
    shape = np.array(array.shape)
    affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)
    image = nib.Nifti1Image(array, affine)
    reoriented = image.as_reoriented(ornt_transform(axcodes2ornt("PLS"), axcodes2ornt(tuple(axes))))
    reoriented.header.set_xyzt_units("mm")
    nib.Nifti1Image(np.asarray(reoriented.dataobj), reoriented.affine, reoriented.header).to_filename(path)


def _draw_anatomy(person: np.random.Generator, scan: np.random.Generator, *, nearly_free: bool) -> _Anatomy:
    body = np.array([person.uniform(155, 185), person.uniform(105, 125)])
    lung_axes = np.array([0.36 * body[0], 0.66 * body[1]]) * person.uniform(0.94, 1.04)
    lung_centre = np.array([0.44 * body[0], person.uniform(-2, 6)])
    base, apex = person.uniform(-118, -100), person.uniform(105, 120)

    def tube(side: int) -> Floats:
        hilum = np.array([side * 26.0, 6.0, person.uniform(-10, 30)])
        x = side * (lung_centre[0] + lung_axes[0] * person.uniform(-0.6, 0.9))
        y = lung_centre[1] + lung_axes[1] * person.uniform(-0.85, 0.85)
        return _tube(person, hilum, np.array([x, y, person.uniform(base + 20, apex - 15)]))

    tubes = [tube(side) for side in (-1, 1) for _ in range(48)]
    fields = np.stack([_smooth_noise(scan, scale) for scale in (1.0, 2.2, 4.0)])
    anatomy = _Anatomy(
        body=body,
        fat=person.uniform(9, 24),
        lung_centre=lung_centre,
        lung_axes=lung_axes,
        base=base,
        apex=apex,
        dome=person.uniform(38, 55),
        heart=np.array(
            [person.uniform(12, 20), person.uniform(-30, -22), person.uniform(46, 54), person.uniform(38, 46)]
        ),
        vessels=np.concatenate(tubes),
        bronchi=_bronchi(),
        lesions=(),
        fields=fields.astype(np.float32),
        parenchyma_hu=person.uniform(-870, -820),
    )
    return dataclasses.replace(anatomy, lesions=_draw_lesions(scan, anatomy, nearly_free))


def _smooth_noise(rng: np.random.Generator, scale: float) -> FloatArray:
    noise = ndimage.gaussian_filter(rng.standard_normal((40, 56, 56)), scale, mode="wrap")
    return (noise / noise.std()).astype(np.float32)


def _tube(rng: np.random.Generator, start: Floats, goal: Floats) -> Floats:
    """A vessel that bends and tapers: (90, 4) points and radii."""
    t = np.linspace(0, 1, 90)[:, None]
    bend = rng.normal(0, 9, 3) * np.sin(np.pi * t)
    radius = rng.uniform(2.2, 3.8) * (1 - t) + 0.9
    return np.concatenate([start + (goal - start) * t + bend, radius], axis=1)


def _bronchi() -> Floats:
    """Trachea and main bronchi: (points, 4)."""
    trachea = np.stack([np.zeros(60), np.full(60, 12.0), np.linspace(150, 38, 60), np.full(60, 9.0)], axis=1)
    t = np.linspace(0, 1, 25)
    sides = [np.stack([side * 34 * t, 12 - 4 * t, 38 - 24 * t, 7 - 3 * t], axis=1) for side in (-1, 1)]
    return np.concatenate([trachea, *sides])


def _draw_lesions(rng: np.random.Generator, anatomy: _Anatomy, nearly_free: bool) -> tuple[_Lesion, ...]:
    """One or two small ones where the scan is nearly free; else several, most at the border and towards the back."""
    count = int(rng.integers(1, 3)) if nearly_free else int(rng.integers(5, 12))
    lesions = []
    for _ in range(count):
        side, angle, depth = rng.choice([-1, 1]), rng.normal(np.pi / 2, 1.0), rng.uniform(0.5, 0.98)
        z = rng.uniform(anatomy.base + 35, anatomy.apex - 45)
        x = side * anatomy.lung_centre[0] + anatomy.lung_axes[0] * depth * np.cos(angle)
        y = anatomy.lung_centre[1] + anatomy.lung_axes[1] * depth * np.sin(angle)
        radius = rng.uniform(9, 13) if nearly_free else rng.uniform(14, 34)
        radii = radius * rng.uniform(0.7, 1.3, 3) * np.array([1, 1, 1.2])
        hu = rng.uniform(-60, 40) if rng.random() < 0.35 else rng.uniform(-620, -380)
        lesions.append(_Lesion(np.array([x, y, z]), radii, hu))
    return tuple(lesions)


def draw_scan(
    person: np.random.Generator,
    scan: np.random.Generator,
    shape: tuple[int, int, int],
    spacing_mm: Floats,
    *,
    nearly_free: bool = False,
) -> tuple[FloatArray, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draws one scan in memory.

    Args:
      person: decides the anatomy.
      scan: decides lesions, noise and blur.
      shape: (rows, columns, slices) about the middle of the chest.
      spacing_mm: (3,), of columns, rows and slices.
      nearly_free: whether there is next to no infection.

    Returns:
      HU, lung labels (0, 1 left, 2 right) and infection (0 or 1), each of that shape, oriented (posterior, left,
      superior).
    """
    anatomy = _draw_anatomy(person, scan, nearly_free=nearly_free)
    rows, columns, slices = shape
    y, x = np.meshgrid(
        (np.arange(rows) - (rows - 1) / 2) * spacing_mm[1],
        (np.arange(columns) - (columns - 1) / 2) * spacing_mm[0],
        indexing="ij",
    )
    hu = np.empty(shape, np.float32)
    lung, infection = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    sigma, blur = scan.uniform(18, 32), scan.uniform(0.5, 0.8)
    for k in range(slices):
        z = (k - (slices - 1) / 2) * spacing_mm[2]
        clean, lung[..., k], infection[..., k] = _render_slice(anatomy, x, y, z, spacing_mm)
        hu[..., k] = ndimage.gaussian_filter(clean, blur / spacing_mm[0]) + scan.normal(0, sigma, clean.shape)
    return hu, lung, infection


def _render_slice(
    anatomy: _Anatomy, x: Floats, y: Floats, z: float, spacing: Floats
) -> tuple[Floats, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    texture, wobble, drift = (_sample(field, x, y, z) for field in anatomy.fields)
    hu = _draw_body(anatomy, x, y, z, texture)
    lung = _lung_mask(anatomy, x, y, z, wobble)
    heart = _ellipse(x, y, anatomy.heart[:2], anatomy.heart[2:] * np.sqrt(max(1e-3, 1 - ((z + 40) / 75) ** 2)))
    lung &= ~((heart < 1) & (abs(z + 40) < 75))
    lung &= np.abs(x - 3 * wobble) > 20 + 8 * np.exp(-(((y - 5) / 30) ** 2))  # mediastinum
    dependent = 130 * np.clip((y - anatomy.lung_centre[1]) / anatomy.lung_axes[1], 0, 1) ** 4
    hu = np.where(lung, anatomy.parenchyma_hu + 22 * texture + 18 * drift + dependent, hu)
    infection = np.zeros(lung.shape, bool)
    for lesion in anatomy.lesions:
        inside = np.sqrt(
            ((x - lesion.centre[0]) / lesion.radii[0]) ** 2
            + ((y - lesion.centre[1]) / lesion.radii[1]) ** 2
            + ((z - lesion.centre[2]) / lesion.radii[2]) ** 2
        )
        alpha = np.clip(0.5 + (1 - inside - 0.2 * wobble) / 0.3, 0, 1) * lung
        hu += alpha * np.clip(lesion.hu + 45 * texture - hu, 0, None)
        infection |= alpha > 0.5
    vessel = _stamp(anatomy.vessels, x.shape, z, spacing) * lung
    hu += vessel * np.clip(40 - hu, 0, None)
    airway = _stamp(anatomy.bronchi, x.shape, z, spacing)
    wall = _stamp(anatomy.bronchi + np.array([0, 0, 0, 1.8]), x.shape, z, spacing)
    hu += wall * (20 - hu)
    hu += airway * (-985 - hu)
    lung &= wall < 0.5
    labels = np.where(lung, np.where(x > 0, 1, 2), 0).astype(np.uint8)
    return hu, labels, (infection & lung).astype(np.uint8)


def _ellipse(x: Floats, y: Floats, centre: Floats, axes: Floats) -> Floats:
    """Distance from the centre; 1 on the border."""
    return np.sqrt(((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2)


def _draw_body(anatomy: _Anatomy, x: Floats, y: Floats, z: float, texture: Floats) -> Floats:
    """Table, skin, fat, muscle, ribs, spine, sternum, liver and stomach gas, in HU."""
    a, b = anatomy.body * (1 - 0.25 * max(0.0, (z - 105) / 45) ** 2)
    hu = np.full(x.shape, -1000.0)
    hu[(np.abs(y - (b + 14 - (x / 60) ** 2)) < 3) & (np.abs(x) < 190)] = -200
    outer = (np.abs(x) / a) ** 2.4 + (np.abs(y) / b) ** 2.4
    inner = (np.abs(x) / (a - anatomy.fat)) ** 2.4 + (np.abs(y) / (b - 0.8 * anatomy.fat)) ** 2.4
    hu = np.where(outer < 1, -100 + 12 * texture, hu)
    hu = np.where(inner < 1, 45 + 14 * texture, hu)
    ring = _ellipse(x, y, np.zeros(2), np.array([0.83 * a, 0.8 * b]))
    ribs = (np.abs(ring - 1) < 0.045) & (np.sin(9 * np.arctan2(y, np.abs(x)) + z / 9) > 0.35)
    hu[ribs] = 420
    spine = _ellipse(x, y, np.array([0, 0.66 * b]), np.array([21, 18]))
    hu = np.where(spine < 1, 260 + 120 * (spine > 0.85), hu)
    hu[_ellipse(x, y, np.array([0, 0.66 * b + 24]), np.array([8, 7])) < 1] = 15
    hu[_ellipse(x, y, np.array([0, -0.82 * b]), np.array([19, 6])) < 1] = 310
    if z < anatomy.base + 20:
        hu[_ellipse(x, y, np.array([58, -20]), np.array([26, 17])) < 1] = -960
    return hu


def _lung_mask(anatomy: _Anatomy, x: Floats, y: Floats, z: float, wobble: Floats) -> npt.NDArray[np.bool_]:
    """Two tapering lungs; from below, the diaphragm's domes leave a ring that deepens towards the back."""
    height = (z - anatomy.base) / (anatomy.apex - anatomy.base)
    if not 0 < height < 1:
        return np.zeros(x.shape, bool)
    taper = np.sqrt(1 - max(0.0, (height - 0.35) / 0.65) ** 2)
    distance = _ellipse(np.abs(x), y, anatomy.lung_centre, anatomy.lung_axes * taper)
    floor = anatomy.base + anatomy.dome * (1 - distance**2) - 12 * (y - anatomy.lung_centre[1]) / anatomy.lung_axes[1]
    return (distance + 0.03 * wobble < 1) & (z > floor)


def _sample(field: FloatArray, x: Floats, y: Floats, z: float) -> Floats:
    """Smooth noise at a slice, repeating in space."""
    step = 8.0
    coordinates = np.stack([np.full(x.shape, z / step), y / step, x / step])
    return ndimage.map_coordinates(field, coordinates, order=1, mode="grid-wrap", output=np.float64)


def _stamp(tube: Floats, shape: tuple[int, int], z: float, spacing: Floats) -> Floats:
    """How much of each pixel a tube covers in a slice, in [0, 1]."""
    covered = np.zeros(shape)
    near = np.abs(tube[:, 2] - z) < np.maximum(tube[:, 3], spacing[2] / 2)
    for px, py, radius in tube[near][:, [0, 1, 3]]:
        row, column = py / spacing[1] + (shape[0] - 1) / 2, px / spacing[0] + (shape[1] - 1) / 2
        reach = int(radius / spacing[0]) + 2
        r0, c0 = max(0, int(row) - reach), max(0, int(column) - reach)
        window = covered[r0 : int(row) + reach + 1, c0 : int(column) + reach + 1]
        dy = (np.arange(r0, r0 + window.shape[0]) - row)[:, None] * spacing[1]
        dx = (np.arange(c0, c0 + window.shape[1]) - column)[None] * spacing[0]
        np.maximum(window, np.clip((radius - np.hypot(dx, dy)) / spacing[0] + 0.5, 0, 1), out=window)
    return covered
