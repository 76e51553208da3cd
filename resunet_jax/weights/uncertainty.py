"""What is known of a pair of models' errors, kept with the infection model: its temperature, and what intervals need.

uncertainty.json lies in the infection model's folder (a workdir or a saved model) and is made by `calibrate`. It is
bound to the weights of both models, and its residuals to the settings that make the masks.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from resunet_jax.errors import InputError, first_line
from resunet_jax.files import expand_user, json_text, write_text
from resunet_jax.metrics.calibration import TEMPERATURES
from resunet_jax.metrics.conformal import QUANTITIES, default_level, split_interval

UNCERTAINTY_FILE = "uncertainty.json"
"""Name of the file."""

Method = Literal["split_conformal", "fold_residuals"]


@dataclasses.dataclass(frozen=True)
class UncertaintyRecord:
    """What a calibration found.

    Attributes:
      fingerprints: of the models that it is for, "lung" and "infection".
      temperature: by which the logits of the infection are divided where its probability is reported.
      calibration: of patients that neither trained the model nor chose the temperature, see `calibration_of_unseen`:
        "ece" and "brier" as the models give probabilities, "ece_calibrated" and "brier_calibrated" with the
        temperature, and more.
      method: "split_conformal", by these very models on held-out patients; or "fold_residuals", by the
        models of a cross-validation on the patients that they have not seen: an estimate for other models.
      residuals: by the names of `QUANTITIES`, one for each patient, ascending, see `Quantity.residual`.
      settings: of the masks that the residuals are of, see `Predictor.mask_settings`.
      source: in words, where it comes from.
      patient_ids: of those with a residual of the infection's volume; before 0.18.4 none were kept.
    """

    fingerprints: Mapping[str, str]
    temperature: float
    calibration: Mapping[str, float]
    method: Method
    residuals: Mapping[str, list[float]]
    settings: Mapping[str, Any]
    source: str
    patient_ids: tuple[str, ...] = ()

    @property
    def patients(self) -> int:
        """How many the residuals are of."""
        return min(map(len, self.residuals.values()))

    @property
    def level(self) -> float:
        """Of the intervals, see `default_level`."""
        return default_level(self.patients)

    @property
    def guarantee(self) -> float | None:
        """How often a new patient's interval covers at least, where patients come alike; None where nothing is sure."""
        return self.level if self.method == "split_conformal" else None

    def interval(self, name: str, predicted: float) -> tuple[float, float]:
        """Around a predicted value of one of `QUANTITIES`, in its unit."""
        return split_interval(predicted, self.residuals[name], self.level, QUANTITIES[name])

    def to_json(self) -> str:
        """The content of the file."""
        return json_text(dataclasses.asdict(self))


def parse_record(text: str | bytes, where: str) -> UncertaintyRecord:
    """The record of a file's content; keys that are not known are ignored.

    Raises:
      InputError: it is no such record.
    """
    try:
        values = json.loads(text)
        names = values.get("patient_ids", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("patient_ids are no names")
        values["patient_ids"] = tuple(names)
        record = UncertaintyRecord(
            **{field.name: values[field.name] for field in dataclasses.fields(UncertaintyRecord)}
        )
        numbers = [record.temperature, *(r for name in QUANTITIES for r in record.residuals[name])]
        if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError("a number is missing or negative")
        if not TEMPERATURES[0] <= record.temperature <= TEMPERATURES[1]:
            raise ValueError(f"temperature {record.temperature}")
        if postprocess := record.settings.get("infection_postprocess"):  # before 0.14.0 none was kept for its volume
            postprocess.setdefault("keep_lesion_ml", 0.0)
        if not record.patients or record.method not in get_args(Method):
            raise ValueError("no patient, or an unknown method")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"{where}: no record of an uncertainty ({first_line(error)}); delete it, then run calibrate to make another"
        ) from error
    return record


def save_record(folder: Path, record: UncertaintyRecord) -> Path:
    """Writes the record next to an infection model, atomically; returns the file.

    Raises:
      InputError: it cannot be written.
    """
    write_text(folder / UNCERTAINTY_FILE, record.to_json())
    return folder / UNCERTAINTY_FILE


def load_record(path: str | Path) -> UncertaintyRecord | None:
    """The record of the infection model in a workdir or saved model; None where there is none.

    Raises:
      InputError: it is damaged.
    """
    file = expand_user(path) / UNCERTAINTY_FILE
    try:
        return parse_record(file.read_bytes(), str(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({first_line(error)}); change its permissions, or delete it"
        ) from error
