"""Masks as DICOM-SEG, which refers to the series that it was made from; by highdicom, the extra `dicom-seg`."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from resunet_jax import __version__
from resunet_jax.data.readers.dicom import series_datasets, without_warnings
from resunet_jax.data.readers.source import Source
from resunet_jax.data.volume import Array, Grid
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import atomic_file

_CODES = {
    "left lung": ("Anatomical Structure", "91723000", "Left lung", "44029006"),
    "right lung": ("Anatomical Structure", "91723000", "Right lung", "3341006"),
    "infection": ("Morphologically Abnormal Structure", "49755003", "Pneumonia", "233604007"),
}
"""Of each segment: category and type as SNOMED CT names and codes."""

_WANTED = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)


def write_dicom_seg(path: Path, source: Source, grid: Grid, masks: Mapping[str, Array]) -> None:
    """Writes masks as one binary DICOM-SEG, atomically.

    As the standard demands, the file carries patient and study of the series that it refers to. Masks are "left lung",
    "right lung" and "infection", bool (rows, columns, slices) on the grid of the series, oriented (posterior, left,
    superior); an empty one is left out, and at least one is not.

    Raises:
      InputError: not DICOM, highdicom is not installed, or the file cannot be written.
    """
    hd = require_dicom_seg(source)
    found = {name: mask for name, mask in masks.items() if mask.any()}
    # (columns, rows, slices) of the grid are (frames, rows, columns) of the series.
    frames = np.stack([grid.from_pls(mask).T for mask in found.values()], axis=-1).astype(np.uint8)
    datasets, places = series_datasets(source)
    frames = frames[np.argsort(places, kind="stable")]  # as they lie in a multi-frame file
    with without_warnings():  # about values of the series, which are copied as they are
        try:
            segmentation = hd.seg.Segmentation(
                source_images=[_completed(dataset) for dataset in datasets],
                pixel_array=frames,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=list(_descriptions(hd, found)),
                series_instance_uid=hd.UID(),
                series_number=1000,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="resunet_jax",
                manufacturer_model_name="resunet_jax",
                software_versions=__version__,
                device_serial_number="0",
                omit_empty_frames=True,
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{source.path}: no DICOM-SEG can refer to it ({first_line(error)})") from error
        database = getattr(segmentation, "_db_con", None)  # highdicom leaves it open, of which Python 3.13 warns
        with contextlib.closing(database) if database else contextlib.nullcontext(), atomic_file(path) as partial:
            segmentation.save_as(partial)


def require_dicom_seg(source: Source) -> Any:
    """The module of highdicom, for a DICOM series.

    Raises:
      InputError: not DICOM, or highdicom is not installed.
    """
    if source.format != "dicom":
        raise InputError(f"{source.path}: a DICOM-SEG refers to a DICOM series, which it is not; leave out `dicom_seg`")
    try:
        import highdicom  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InputError('`dicom_seg` needs highdicom: pip install "resunet-jax[dicom-seg]"') from error
    return highdicom


def _completed(dataset: Any) -> Any:
    """With empty values where attributes are absent that the standard wants, and that we do not use."""
    for name in _WANTED:
        if name not in dataset:
            setattr(dataset, name, None)
    return dataset


def _descriptions(hd: Any, names: Mapping[str, Array]) -> Iterator[Any]:
    algorithm = hd.AlgorithmIdentificationSequence(
        name="resunet_jax", version=__version__, family=hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
    )
    for number, name in enumerate(names, 1):
        category, category_code, kind, kind_code = _CODES[name]
        yield hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=hd.sr.CodedConcept(category_code, "SCT", category),
            segmented_property_type=hd.sr.CodedConcept(kind_code, "SCT", kind),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
