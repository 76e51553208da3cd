"""Training, validation and test cases: always by patient, never by slice."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resunet_jax.data.cases import KNOWN_CASES, Case
from resunet_jax.errors import InputError
from resunet_jax.files import write_text

PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Case ids of each part; every part is sorted as the cases are."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def cases(self, part: str, cases: Sequence[Case]) -> list[Case]:
        """The cases of a part: "train", "val" or "test".

        Raises:
          InputError: the part is empty, or a case is not among `cases`.
        """
        ids: tuple[str, ...] = getattr(self, part)
        known = {case.id: case for case in cases}
        for case_id in ids:
            if case_id not in known:
                raise InputError(f"the split names {case_id}, which is not in the data; there are {', '.join(known)}")
        if not ids:
            raise InputError(f"the split has no {part} case; name some in --split_file")
        return [known[case_id] for case_id in dict.fromkeys(ids)]


def make_split(cases: Sequence[Case], split_file: Path | None = None, split_seed: int | None = None) -> Split:
    """The split of a file; else, of the full set, the original's; else by proportions.

    Args:
      cases: all cases.
      split_file: JSON, {"train": [ids], "val": [ids], "test": [ids]}.
      split_seed: asks for a split by proportions even of the full set.

    Raises:
      InputError: see `read_split`, `original_split` and `ratio_split`.
    """
    if split_file is not None:
        return read_split(split_file, cases)
    if split_seed is None and set(KNOWN_CASES) <= {case.id for case in cases}:
        return original_split(cases)
    return ratio_split(cases, split_seed or 0)


def original_split(cases: Sequence[Case]) -> Split:
    """Of each source the first 8 cases train, the 9th validates, the 10th tests, as in the original project."""
    known = [case_id for case_id in KNOWN_CASES if case_id in {case.id for case in cases}]
    if len(known) < len(KNOWN_CASES):
        missing = sorted(set(KNOWN_CASES) - set(known))
        raise InputError(f"the original split needs the full set; {', '.join(missing)} are missing")
    first, second = known[:10], known[10:]
    return Split((*first[:8], *second[:8]), (first[8], second[8]), (first[9], second[9]))


def ratio_split(cases: Sequence[Case], seed: int, val: float = 0.2, test: float = 0.2) -> Split:
    """Patients in random order: the first part tests, the next validates, the rest trains.

    Args:
      cases: all cases.
      seed: of the order.
      val: share of the patients that validate, at least one of them.
      test: share of the patients that test, at least one of them.

    Raises:
      InputError: fewer than three patients.
    """
    patients = sorted({case.patient for case in cases})
    if len(patients) < 3:
        raise InputError(
            f"{len(patients)} patient(s) are too few to train, validate and test apart, which takes 3; "
            "add scans, or name the parts in --split_file"
        )
    patients = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    n_test, n_val = (max(1, round(share * len(patients))) for share in (test, val))
    parts = (patients[n_test + n_val :], patients[n_test : n_test + n_val], patients[:n_test])
    return Split(*(tuple(case.id for case in cases if case.patient in part) for part in parts))


def read_split(path: Path, cases: Sequence[Case] | None = None) -> Split:
    """Reads a split from JSON; a part that is not named is empty.

    Args:
      path: JSON, {"train": [ids], "val": [ids], "test": [ids]}.
      cases: if given, ids are checked against them and no patient may be in two parts.

    Raises:
      InputError: no such file, not of that form, unknown ids, or a patient in two parts.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the split ({error.strerror}); check --split_file") from error
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); wanted {{'train': [ids], 'val': [ids], 'test': [ids]}}"
        ) from error
    good = isinstance(values, dict) and set(values) <= set(PARTS) and "train" in values
    if not good or not all(
        isinstance(ids, list) and all(isinstance(case_id, str) for case_id in ids) for ids in values.values()
    ):
        raise InputError(f'{path}: wanted {{"train": [ids], "val": [ids], "test": [ids]}}')
    split = Split(*(tuple(values.get(part, ())) for part in PARTS))
    if cases is not None:
        _check_patients(path, split, cases)
    return split


def _check_patients(path: Path, split: Split, cases: Sequence[Case]) -> None:
    patients = {case.id: case.patient for case in cases}
    seen: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for case_id in getattr(split, part):
            if case_id not in patients:
                raise InputError(f"{path}: no case {case_id} in the data; there are {', '.join(patients)}")
            other_part, other = seen.setdefault(patients[case_id], (part, case_id))
            if other_part != part:
                raise InputError(
                    f"{path}: {other} ({other_part}) and {case_id} ({part}) are the same patient; put both in one part"
                )


def write_split(path: Path, split: Split) -> None:
    """Writes the form that `read_split` reads."""
    write_text(path, json.dumps(dataclasses.asdict(split), indent=2) + "\n")
