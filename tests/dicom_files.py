"""A small CT volume written as DICOM, in every way that matters to a reader."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

PATIENT = "Nobody^Ever"
"""A name that must never show up anywhere."""

ROW = np.array([1.0, 0, 0])
COLUMN = np.array([0.0, 1, 0])
SPACING = (0.8, 0.7)  # between rows, between columns


def slice_dataset(hu: np.ndarray, position: Any, *, uid: str, syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """One slice: hu (rows, columns) whole numbers, stored with intercept -1024."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = PATIENT, "ID-4711", "19010203"
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are free text
        dataset.SeriesInstanceUID = uid
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
    dataset.Modality, dataset.SeriesNumber = "CT", 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient = [float(x) for x in position]
    dataset.ImageOrientationPatient = [*ROW, *COLUMN]
    dataset.PixelSpacing, dataset.SliceThickness = list(SPACING), 5.0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = hu.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = (hu + 1024).clip(0, 4095).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def write_series(
    folder: Path,
    hu: np.ndarray,
    *,
    step: Any = (0.0, 0.0, 5.0),
    uid: str | None = None,
    number: int = 1,
    seed: int = 0,
    change: Any = None,
) -> list[Path]:
    """Writes hu (rows, columns, slices) under names in random order; `change(dataset, k)` alters a slice."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid(entropy_srcs=[str(number)]) if uid is None else uid
    order = np.random.default_rng(seed).permutation(hu.shape[-1])
    paths = []
    for k in range(hu.shape[-1]):
        position = np.array([-20.0, -30.0, 100.0]) + k * np.array(step)
        dataset = slice_dataset(hu[..., k], position, uid=uid)
        dataset.SeriesNumber, dataset.InstanceNumber = number, int(order[k])
        if change is not None:
            change(dataset, k)
        paths.append(folder / f"{number}_{order[k]:03}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_multiframe(path: Path, hu: np.ndarray, step: float = 5.0) -> None:
    """The same as one Enhanced CT file, its frames in reverse order."""
    dataset = slice_dataset(hu[..., 0], (0, 0, 0), uid=generate_uid())
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope"):
        delattr(dataset, name)
    del dataset.RescaleIntercept
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames = hu.shape[-1]
    shared, measures, orientation, transform = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING), 5.0
    orientation.ImageOrientationPatient = [*ROW, *COLUMN]
    transform.RescaleSlope, transform.RescaleIntercept = 1, -1024
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
    shared.PixelValueTransformationSequence = Sequence([transform])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for k in reversed(range(hu.shape[-1])):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [-20.0, -30.0, 100.0 + step * k]
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    stored = (np.moveaxis(hu, -1, 0)[::-1] + 1024).clip(0, 4095).astype("<u2")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)


def compress(path: Path, syntax: str) -> None:
    """Writes a file again in another transfer syntax."""
    dataset = pydicom.dcmread(path)
    if syntax in (pydicom.uid.RLELossless, pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEGLSLossless):
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == pydicom.uid.ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    options = {"little_endian": syntax != pydicom.uid.ExplicitVRBigEndian}
    options["implicit_vr"] = syntax == pydicom.uid.ImplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True, **options)


def pack(folder: Path, archive: Path) -> Path:
    """A zip of all files of a folder."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target.write(path, f"series/{path.relative_to(folder)}")
    return archive
