"""The cascade as one file that needs this package no more: a StableHLO program with the weights inside.

`jax.export` keeps a compiled-to-be program for CPUs, CUDA GPUs and TPUs. JAX reads such a file for six months after the
version that wrote it: it is for delivery, and the models' folders are for keeping. These lines load one, and need jax
and flatbuffers only:

    import jax
    import numpy as np
    from jax import export

    with open("cascade.jaxexport", "rb") as file:
        cascade = export.deserialize(bytearray(file.read()))
    run = jax.jit(cascade.call)
    images = np.load("images.npy")  # float32 (slices, S, S, C) in [0, 1]; S and C stand in cascade.jaxexport.json
    lung, infection, *others = run(images)  # "outputs" in that file says what the others are
    np.savez("probabilities.npz", lung=lung, infection=infection)
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import math
import numbers
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resunet_jax import __version__
from resunet_jax.data.volume import HU_WINDOW
from resunet_jax.errors import InputError
from resunet_jax.files import atomic_file, expand_user, make_output_dir, require_absent, write_json
from resunet_jax.model.build import TASKS, adds_lesions, averaging_of, infection_postprocess
from resunet_jax.model.cascade import (
    arithmetic_mean,
    geometric_mean,
    infection_input,
    lung_input,
    predict_probability,
    predict_views,
)
from resunet_jax.weights.store import LoadedModel, fingerprint

PLATFORMS = ("cpu", "cuda", "tpu")
"""What an export runs on."""

READABLE_DAYS = 180
"""For how long JAX promises to read an export, counted from the release of the version that wrote it."""

_SOURCE_FILES = "jax_hlo_source_file_canonicalization_regex"
_CONTEXT = (
    "the slices below (towards the feet) and above lie max(1, round(context_mm / slice distance in mm)) slices away; "
    "beyond the ends the last one is repeated; all channels are cropped by the box of the slice itself"
)
_SIX_MONTHS = (
    "by JAX's policy for six months after the release of the version that wrote it, and by versions up to three weeks "
    "older; export again from the models' folders after that"
)
_NOT_INSIDE = (
    "the body's box in each slice",
    "removal of small components of the lung mask, in three dimensions",
    "the gate that removes infection outside the closed lungs, in three dimensions",
    "removal of small lesions, and of those that are neither certain anywhere nor large, in three dimensions",
    "pasting back to the scan's own grid",
)
_ADDED_NOT_INSIDE = (
    "lesions that are added, before pasting, where those left that reach min_lesion_probability have infected_scan_ml: "
    "with g the infection_geometric_mean inside the gate, components of infected_scan_odds·g / (1 - g + "
    "infected_scan_odds·g) above the threshold that reach infected_scan_lesion_probability, have min_lesion_ml and "
    "overlap none of those left"
)


def cascade_program(
    lung: LoadedModel, infection: LoadedModel, *, thresholds: Mapping[str, float], temperature: float | None = None
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """The pure function that `export_cascade` exports, for other converters; for arguments and errors see there.

    Returns:
      float32 (N, S, S, C) in [0, 1] to lung and infection probability, with a temperature the calibrated infection
      probability, and where the infection model `adds_lesions` the geometric mean of its views, each (N, S, S, 1).
    """
    _check(lung, infection, thresholds, temperature)
    lung_model, infection_model = (one.model.clone(convolution=lax.conv_general_dilated) for one in (lung, infection))
    lung_variables, infection_variables = (jax.tree.map(np.asarray, one.variables) for one in (lung, infection))

    def run(images: jax.Array) -> tuple[jax.Array, ...]:
        lung_probability = predict_probability(
            lung_model,
            lung_variables,
            lung_input(lung_model, images),
            patch_grid=lung.config.model.patch_grid,
            averaging=averaging_of(lung.config),
        )
        views = predict_views(
            infection_model,
            infection_variables,
            infection_input(infection_model, images, lung_probability),
            patch_grid=infection.config.model.patch_grid,
            averaging=averaging_of(infection.config),
        )
        with_lung = (lung_probability > thresholds["lung"]).any(axis=(1, 2, 3), keepdims=True)
        outputs = [lung_probability, jnp.where(with_lung, arithmetic_mean(views), 0)]
        if temperature is not None:
            outputs.append(scale_probability(outputs[1], temperature))
        if adds_lesions(infection.config):
            outputs.append(jnp.where(with_lung, geometric_mean(views), 0))
        return tuple(outputs)

    return run


def scale_probability(probability: jax.Array, temperature: float) -> jax.Array:
    """`apply_temperature` in JAX: float32 in [0, 1], any shape, to the same."""
    larger = jnp.maximum(probability, 1 - probability)
    inside, outside = (probability / larger) ** (1 / temperature), ((1 - probability) / larger) ** (1 / temperature)
    return inside / (inside + outside)


def export_cascade(
    lung: LoadedModel, infection: LoadedModel, *, thresholds: Mapping[str, float], temperature: float | None = None
) -> jax.export.Exported:
    """The cascade from prepared slices to both probabilities, for `PLATFORMS`, with any number of slices.

    It computes what `Predictor.slice_probabilities` does, by XLA's own convolution: on CPUs equal to `cascade` with
    that convolution to 1e-6, and with `default_convolution` to 1e-5. GPUs and TPUs round convolutions as
    `jax.default_matmul_precision` was when the export was made.

    Its input is float32 (b, S, S, C) in [0, 1], as `prepare_volume` makes it; its outputs are lung and infection
    probability, each float32 (b, S, S, 1) in [0, 1]. The infection's is 0 in slices without lung. Weights and the
    closing of the lung probability are inside; both models evaluate by their running statistics. With a temperature
    there is a third output, the calibrated infection probability, to be reported; masks are made of the second, for
    interpolation between pixels and a temperature do not commute. The last output, where the infection model
    `adds_lesions`, is the geometric mean of its views, which `Predictor.postprocess` needs as `GEOMETRIC_MEAN`.

    Args:
      lung: on CT.
      infection: on CT or on [CT, lung probability].
      thresholds: of "lung" and "infection", in (0, 1); that of the lung decides which slices have any.
      temperature: of the infection's reported probability, see `UncertaintyRecord`.

    Returns:
      the program; `.call` runs it, `.serialize()` gives the bytes of a file.

    Raises:
      InputError: the models do not belong together, or a threshold is missing or makes no sense.

    Example:
      >>> import jax, numpy as np
      >>> from resunet_jax.weights.export import export_cascade
      >>> from resunet_jax.weights.pretrained import load_pair
      >>> pair = load_pair()
      >>> exported = export_cascade(*pair, thresholds={"lung": 0.5, "infection": 0.5})
      >>> exported.platforms
      ('cpu', 'cuda', 'tpu')
      >>> images = np.zeros((2, 128, 128, pair.infection.config.preprocess.channels), np.float32)
      >>> lung, infection, geometric_mean = jax.jit(exported.call)(images)
      >>> lung.shape
      (2, 128, 128, 1)
    """
    run = cascade_program(lung, infection, thresholds=thresholds, temperature=temperature)
    size, channels = infection.config.preprocess.image_size, infection.config.preprocess.channels
    (b,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, size, size, channels), jnp.float32)
    return _export(run, images)


def export_cascade_from_hu(
    lung: LoadedModel, infection: LoadedModel, *, thresholds: Mapping[str, float], temperature: float | None = None
) -> jax.export.Exported:
    """`export_cascade` with the preparation of slices inside, but for the choice of the body's boxes.

    Its inputs are slices in Hounsfield units, float32 (b, H, W, C) of any size, oriented (posterior, left), channels as
    in `prepare_volume`, and their boxes, int32 (b, 4): row, column, height and width, at least 1 and within the slice;
    for models without context the slices are (b, H, W). HU are mapped to [0, 1] over
    `HU_WINDOW`, cropped, and resized with antialiasing by `resize_matrix`: equal to `prepare_volume` to 1e-6. For
    arguments and outputs see `export_cascade`.

    Raises:
      InputError: see `export_cascade`; or the models see each slice's own range, not Hounsfield units.
    """
    run = cascade_program(lung, infection, thresholds=thresholds, temperature=temperature)
    preprocess = infection.config.preprocess
    if not preprocess.is_physical:
        raise InputError(
            "`from_hu`: these models see each slice's own range (normalization minmax), not Hounsfield units; export "
            "them for prepared slices, or train with another `normalization`"
        )

    def from_hu(hu: jax.Array, boxes: jax.Array) -> tuple[jax.Array, ...]:
        return run(prepare_hu(hu.reshape(*hu.shape[:3], -1), boxes, preprocess.image_size))

    b, height, width = jax.export.symbolic_shape("b, h, w")
    hu = jax.ShapeDtypeStruct((b, height, width, *_context_shape(infection)), jnp.float32)
    return _export(from_hu, hu, jax.ShapeDtypeStruct((b, 4), jnp.int32))


def prepare_hu(hu: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """What `prepare_volume` does with slices in Hounsfield units, where their boxes are known; in JAX, to 1e-6.

    Args:
      hu: float32 (N, H, W, C).
      boxes: int32 (N, 4): row, column, height, width.
      size: S.

    Returns:
      float32 (N, S, S, C) in [0, 1].
    """
    low, high = HU_WINDOW
    windowed = jnp.clip((hu - low) / (high - low), 0, 1)
    rows = jax.vmap(lambda box: resize_matrix(box[0], box[2], hu.shape[1], size))(boxes)
    columns = jax.vmap(lambda box: resize_matrix(box[1], box[3], hu.shape[2], size))(boxes)
    narrow = jnp.einsum("nhwc,ntw->nhtc", windowed, columns, precision=lax.Precision.HIGHEST)
    return jnp.einsum("nsh,nhtc->nstc", rows, narrow, precision=lax.Precision.HIGHEST)


def resize_matrix(first: jax.Array, length: jax.Array, total: Any, size: int) -> jax.Array:
    """The weights by which PIL's antialiased BILINEAR resizes an interval of a row of pixels.

    They are a triangle around each output pixel's centre, as wide as two pixels of the coarser side. Its heights times
    2·max(size, length) are whole numbers, so that only their sum rounds.

    Args:
      first: int32 scalar, the interval's first pixel.
      length: int32 scalar, its pixels, at least 1.
      total: pixels of the row; a dimension of an array, perhaps symbolic.
      size: of the output, in pixels.

    Returns:
      float32 (size, total), each row of sum 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(resize_matrix(jnp.int32(1), jnp.int32(2), 3, size=4))
      [[0.   1.   0.  ]
       [0.   0.75 0.25]
       [0.   0.25 0.75]
       [0.   0.   1.  ]]
    """
    pixel = jnp.arange(total, dtype=jnp.int32)[None, :] - first
    target = jnp.arange(size, dtype=jnp.int32)[:, None]
    apart = jnp.abs((2 * pixel + 1) * size - (2 * target + 1) * length)
    weight = jnp.maximum(0, 2 * jnp.maximum(size, length) - apart)
    weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0).astype(jnp.float32)
    return weight / weight.sum(axis=1, keepdims=True)


def write_export(
    path: str | Path,
    lung: LoadedModel,
    infection: LoadedModel,
    *,
    thresholds: Mapping[str, float],
    temperature: float | None = None,
    from_hu: bool = False,
) -> dict[str, Any]:
    """Exports the cascade to a file, and writes what to know of it to `<path>.json`; each appears atomically.

    Neither file may exist. For the other arguments see `export_cascade`; `from_hu` exports `export_cascade_from_hu`.

    Returns:
      what the JSON file holds.

    Raises:
      InputError: see the functions; or a file exists or cannot be written.
    """
    check_new_files(path)
    make = export_cascade_from_hu if from_hu else export_cascade
    exported = make(lung, infection, thresholds=thresholds, temperature=temperature)
    form = {
        "format": "jax.export (StableHLO), for jax.export.deserialize",
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "readable": _SIX_MONTHS,
        "readable_days": READABLE_DAYS,
    }
    description = describe_cascade(lung, infection, thresholds=thresholds, temperature=temperature, from_hu=from_hu)
    return write_files(path, bytes(exported.serialize()), {**form, **description})


def describe_cascade(
    lung: LoadedModel,
    infection: LoadedModel,
    *,
    thresholds: Mapping[str, float],
    temperature: float | None = None,
    from_hu: bool = False,
) -> dict[str, Any]:
    """What somebody without this package has to know of an export, in JSON values; for arguments see `write_export`."""
    size = lung.config.preprocess.image_size
    fraction = infection.model.closing_fraction if TASKS[infection.config.task].uses_lung else 0.0
    probability = {"shape": ["b", size, size, 1], "dtype": "float32", "range": [0, 1]}
    outputs = {
        "lung_probability": "of the lung's masks",
        "infection_probability": "of the infection's masks",
        "calibrated_infection_probability": "to be reported; masks are made of the one without a temperature",
        "infection_geometric_mean": "of the two views of a slice; for the lesions that are added, see not_inside",
    }
    if temperature is None:
        del outputs["calibrated_infection_probability"]
    if not adds_lesions(infection.config):
        del outputs["infection_geometric_mean"]
    return {
        "written_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "inputs": _inputs(infection, from_hu),
        "outputs": [{"name": name, "description": text, **probability} for name, text in outputs.items()],
        "preprocessing": _preprocessing(infection, from_hu),
        "thresholds": {name: float(thresholds[name]) for name in ("lung", "infection")},
        "threshold_rule": "a voxel belongs to a mask where its probability is above the threshold; in slices without "
        "lung above its threshold the infection probability is 0",
        "temperature": None if temperature is None else float(temperature),
        "lung_closing": {"fraction": fraction, "pixels": 2 * round(fraction * size / 2) + 1},
        "models": {
            name: {
                "fingerprint": fingerprint(model.variables),
                "task": model.config.task,
                **dataclasses.asdict(model.config.model),
                "filters": list(model.config.model.filters),
            }
            for name, model in (("lung", lung), ("infection", infection))
        },
        "not_inside": [*_NOT_INSIDE, *[_ADDED_NOT_INSIDE] * adds_lesions(infection.config)],
        "postprocessing_of_the_package": {
            "min_component_fraction": lung.config.postprocess.min_component_fraction,
            **infection_postprocess(infection.config),
        },
        "versions": {
            "resunet-jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        },
    }


def check_new_files(path: str | Path) -> None:
    """Raises `InputError` where `path` or `<path>.json` exists."""
    path = expand_user(path)
    for file in (path, _metadata_path(path)):
        require_absent(file, "file")


def write_files(path: str | Path, content: bytes, description: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a program, and to `<path>.json` its name, SHA-256 and description; each appears atomically.

    Returns:
      what the JSON file holds.

    Raises:
      InputError: a file exists or cannot be written.
    """
    path = expand_user(path).absolute()
    check_new_files(path)
    make_output_dir(path.parent)
    metadata = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), **description}
    with atomic_file(path) as partial:
        partial.write_bytes(content)
    write_json(_metadata_path(path), metadata)
    return metadata


def _metadata_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _is_within(value: Any, high: float) -> bool:
    """Whether it is a number in (0, high)."""
    return isinstance(value, numbers.Real) and 0 < float(value) < high


def _check(
    lung: LoadedModel, infection: LoadedModel, thresholds: Mapping[str, float], temperature: float | None
) -> None:
    if temperature is not None and not _is_within(temperature, math.inf):
        raise InputError(f"`temperature`: {temperature!r}; it must be a number above 0")
    for name, model in (("lung", lung), ("infection", infection)):
        if (found := TASKS[model.config.task].target) != name:
            raise InputError(f"`{name}`: expected a {name} model, this one segments {found}; give the other model")
        threshold = thresholds.get(name)
        if not _is_within(threshold, 1):
            raise InputError(f"`thresholds`: that of {name} is {threshold!r}; it must be a number in (0, 1)")
    if not lung.config.preprocess.can_feed(infection.config.preprocess):
        raise InputError(
            f"the models were trained on slices prepared differently ({lung.config.preprocess}, "
            f"{infection.config.preprocess}); use models trained alike"
        )


def _export(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> jax.export.Exported:
    with _without_folders():
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Programs made within name the source files of their lines without the folders of this machine."""
    before = getattr(jax.config, _SOURCE_FILES)
    jax.config.update(_SOURCE_FILES, r".*[\\/]")  # what matches is removed
    try:
        yield
    finally:
        jax.config.update(_SOURCE_FILES, before)


def _context_shape(infection: LoadedModel) -> tuple[int, ...]:
    """The axis of channels of slices in HU, which models without context do not have."""
    channels = infection.config.preprocess.channels
    return (channels,) if channels > 1 else ()


def _inputs(infection: LoadedModel, from_hu: bool) -> list[dict[str, Any]]:
    size, channels = infection.config.preprocess.image_size, infection.config.preprocess.channels
    if not from_hu:
        return [{"name": "images", "shape": ["b", size, size, channels], "dtype": "float32", "range": [0, 1]}]
    return [
        {"name": "hu", "shape": ["b", "h", "w", *_context_shape(infection)], "dtype": "float32", "unit": "HU"},
        {"name": "boxes", "shape": ["b", 4], "dtype": "int32", "unit": "pixels: row, column, height, width"},
    ]


def _preprocessing(infection: LoadedModel, from_hu: bool) -> dict[str, Any]:
    config = infection.config.preprocess
    if config.is_physical:
        window: dict[str, Any] = {"hu_window": list(HU_WINDOW), "range": [0, 1], "outside": "clipped"}
    else:
        window = {"own_range": "each slice's own minimum is 0, its maximum 1"}
    return {
        "orientation": "axial slices: rows towards the back, columns towards the patient's left",
        "normalization": config.normalization,
        **window,
        "box": "bounding box of the largest component (eight neighbours) of what is above body_threshold_hu, dilated "
        "body_dilation times by the four neighbours",
        "body_threshold_hu": config.body_threshold_hu,
        "body_thresholds_minmax": list(config.body_thresholds_minmax),
        "body_dilation": config.body_dilation,
        "resize": "the box to image_size × image_size, bilinear with antialiasing (as PIL's BILINEAR)",
        "image_size": config.image_size,
        "context_mm": config.context_mm,
        "channels": ["the slice", "the one below", "the one above"][: config.channels],
        **({"context": _CONTEXT} if config.context_mm else {}),
        "inside": ["window", "crop", "resize"] if from_hu else [],
    }
