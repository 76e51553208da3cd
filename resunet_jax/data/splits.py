"""Training, validation and test cases: whole scans, and whole patients but for the benchmark's folds."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from resunet_jax.data.cases import KNOWN_CASES, Case
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import expand_user, write_json
from resunet_jax.progress import logger

SUBSETS = ("train", "val", "test")
Protocol = Literal["original", "few_shot", "five_fold", "patient_five_fold", "ratio"]
FOLD_PROTOCOLS: tuple[Protocol, ...] = ("few_shot", "five_fold", "patient_five_fold")
NUM_FOLDS = 5
"""Of every protocol in `FOLD_PROTOCOLS`."""

_SPLITS_PATIENTS = re.compile(rf"(few_shot|five_fold)(, fold \d of {NUM_FOLDS}.*)?$", re.DOTALL)  # and says so
_GROUPS = (
    ("coronacases_008", "coronacases_007", "radiopaedia_36_86526_0", "radiopaedia_4_85506_1"),
    ("coronacases_009", "coronacases_004", "radiopaedia_14_85914_0", "radiopaedia_7_85703_0"),
    ("coronacases_010", "coronacases_001", "radiopaedia_10_85902_1", "radiopaedia_29_86491_1"),
    ("coronacases_003", "coronacases_005", "radiopaedia_40_86625_0", "radiopaedia_27_86410_0"),
    ("coronacases_002", "coronacases_006", "radiopaedia_10_85902_3", "radiopaedia_29_86490_1"),
)
"""The benchmark's groups, which split two patients across sets (Ma et al., Medical Physics 48(3), 2021)."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Case ids of each subset, in the order of the cases, or of the split file.

    Attributes:
      train: to learn from.
      val: to choose the best epoch and the threshold; may be empty.
      test: to report.
      protocol: how the subsets were chosen, in words, with what is missing; empty for a split file of the user's.
        Splits into the same subsets, in the same order, are equal, however chosen.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    protocol: str = dataclasses.field(default="", compare=False)

    def has_subsets_of(self, other: "Split") -> bool:
        """Whether the same cases are in each subset, in any order."""
        return all(set(getattr(self, name)) == set(getattr(other, name)) for name in ("train", "val", "test"))

    def cases(self, subset: str, cases: Sequence[Case]) -> list[Case]:
        """The cases of a subset: "train", "val" or "test".

        Raises:
          InputError: the subset is empty, or a case is not among `cases`.
        """
        ids: tuple[str, ...] = getattr(self, subset)
        known = {case.id: case for case in cases}
        for case_id in ids:
            if case_id not in known:
                raise InputError(f"the split names {case_id}, which is not in the data; there are {', '.join(known)}")
        if not ids:
            raise InputError(f"the split has no {subset} case; name some in `split_file`")
        return [known[case_id] for case_id in dict.fromkeys(ids)]


@dataclasses.dataclass(frozen=True)
class SplitRequest:
    """How a split is to be made.

    Attributes:
      split_file: JSON, {"train": [ids], "val": [ids], "test": [ids]}; decides alone.
      protocol: by its name; None is "original" where the full set is there, otherwise "ratio".
      fold: 0 to 4, for the protocols that have folds.
      split_seed: of "ratio"; given without a protocol it asks for "ratio".
      allow_missing: forms "original", "few_shot" and "five_fold" from what is there of the full set.
    """

    split_file: str | Path | None = None
    protocol: Protocol | None = None
    fold: int | None = None
    split_seed: int | None = None
    allow_missing: bool = False


DEFAULT_SPLIT = SplitRequest()


def make_split(cases: Sequence[Case], request: SplitRequest = DEFAULT_SPLIT) -> Split:
    """The split of all cases by a file or a protocol, as is asked for.

    Raises:
      InputError: the request contradicts itself, or the split cannot be formed from these cases.
    """
    protocol, fold = request.protocol, request.fold
    if request.split_file is not None:
        if protocol is not None or fold is not None or request.split_seed is not None or request.allow_missing:
            raise InputError("`split_file` decides alone; drop `protocol`, `fold`, `split_seed` and `allow_missing`")
        return read_split(expand_user(request.split_file), cases)
    if protocol is None:
        is_complete = set(KNOWN_CASES) <= {case.id for case in cases}
        protocol = "original" if is_complete and request.split_seed is None else "ratio"
        if protocol == "original" and (others := [case.id for case in cases if case.id not in KNOWN_CASES]):
            left_out = "%s: not in the original split, so left out; take the protocol ratio or a split file to use them"
            logger.warning(left_out, ", ".join(others))
    _check_request(request, protocol)
    match protocol:
        case "original":
            split = original_split(cases, allow_missing=request.allow_missing)
            _check_patients("`protocol=original`", split, cases)
            return split
        case "ratio":
            return ratio_split(cases, request.split_seed or 0)
        case "patient_five_fold":
            return patient_five_fold_split(cases, fold or 0)
        case "few_shot" | "five_fold":
            return benchmark_split(cases, protocol, fold or 0, allow_missing=request.allow_missing)


def _check_request(request: SplitRequest, protocol: Protocol) -> None:
    if request.split_seed is not None and protocol != "ratio":
        raise InputError(f"`protocol={protocol}` has no seed; drop `split_seed`")
    if request.allow_missing and protocol in ("ratio", "patient_five_fold"):
        raise InputError(
            f"`protocol={protocol}` takes whatever is there; drop `allow_missing`, or choose original, few_shot or "
            "five_fold"
        )
    if protocol in FOLD_PROTOCOLS:
        if request.fold is None or not 0 <= request.fold < NUM_FOLDS:
            raise InputError(f"`protocol={protocol}` needs `fold`, from 0 to {NUM_FOLDS - 1}; got {request.fold}")
    elif request.fold is not None:
        raise InputError(f"`protocol={protocol}` has no folds; drop `fold`, or take one of {', '.join(FOLD_PROTOCOLS)}")


def original_split(cases: Sequence[Case], *, allow_missing: bool = False) -> Split:
    """Of each source the first 8 cases train, the 9th validates, the 10th tests, as in the original project.

    `allow_missing` leaves out what is not there of `cases`, which are all, and says so in the protocol.

    Raises:
      InputError: cases are missing, or a subset would be empty.
    """
    first, second = KNOWN_CASES[:10], KNOWN_CASES[10:]
    subsets = ((*first[:8], *second[:8]), (first[8], second[8]), (first[9], second[9]))
    return _known_split(cases, "original", subsets, allow_missing)


def benchmark_split(
    cases: Sequence[Case], protocol: Literal["few_shot", "five_fold"], fold: int, *, allow_missing: bool = False
) -> Split:
    """The benchmark's folds: no validation cases, as all epochs are trained there.

    "few_shot" trains on the group `fold`, 0 to 4, and tests on the other four; "five_fold" the other way round. For the
    other arguments and errors see `original_split`.
    """
    held_out = _GROUPS[fold]
    rest = tuple(case for case in KNOWN_CASES if case not in held_out)
    subsets = (held_out, (), rest) if protocol == "few_shot" else (rest, (), held_out)
    note = f"{protocol}, fold {fold} of {NUM_FOLDS}; folds split patients across sets"
    return _known_split(cases, note, subsets, allow_missing)


def _known_split(
    cases: Sequence[Case], protocol: str, subsets: tuple[tuple[str, ...], ...], allow_missing: bool
) -> Split:
    there = [case.id for case in cases]
    missing = [case_id for case_id in KNOWN_CASES if case_id not in there]
    name = protocol.partition("; ")[0]
    if missing and not allow_missing:
        raise InputError(
            f"protocol {name} needs the full set; {', '.join(missing)} are missing: add them, or form it from what "
            "is there with `allow_missing`"
        )
    train, val, test = (tuple(case_id for case_id in there if case_id in subset) for subset in subsets)
    for part, subset in (("training", train), ("test", test)):
        if not subset:
            raise InputError(f"protocol {name}: no {part} case of it is in the data; there are {', '.join(there)}")
    note = f"; {len(missing)} of {len(KNOWN_CASES)} cases missing: {', '.join(missing)}" if missing else ""
    return Split(train, val, test, protocol + note)


def patient_five_fold_split(cases: Sequence[Case], fold: int) -> Split:
    """Five folds that keep each patient together and distribute each source evenly; one tests, the others train.

    Formed from whatever cases there are: patients of each source, those with most scans first, go one by one to the
    fold with fewest scans of that source, of equals to the one with fewest scans. `fold`, 0 to 4, tests.

    Raises:
      InputError: fewer patients than folds.
    """
    patients: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.id):
        patients.setdefault(case.patient, []).append(case)
    if len(patients) < NUM_FOLDS:
        raise InputError(
            f"{len(patients)} patient(s) are too few for {NUM_FOLDS} folds; add scans, or take protocol ratio"
        )
    folds: list[list[str]] = [[] for _ in range(NUM_FOLDS)]
    of_source: dict[str, list[int]] = {}
    for scans in sorted(patients.values(), key=lambda scans: (scans[0].source, -len(scans), scans[0].id)):
        counts = of_source.setdefault(scans[0].source, [0] * NUM_FOLDS)
        chosen = min(range(NUM_FOLDS), key=lambda i: (counts[i], len(folds[i]), i))
        counts[chosen] += len(scans)
        folds[chosen] += [case.id for case in scans]
    test = tuple(case.id for case in cases if case.id in folds[fold])
    train = tuple(case.id for case in cases if case.id not in folds[fold])
    known = sum(case.id in KNOWN_CASES for case in cases)
    note = f"; only {known} of the full set's {len(KNOWN_CASES)} cases" if 0 < known < len(KNOWN_CASES) else ""
    return Split(train, (), test, f"patient_five_fold, fold {fold} of {NUM_FOLDS}{note}")


def ratio_split(cases: Sequence[Case], seed: int) -> Split:
    """Patients in a random order: the first fifth tests, the next validates, at least one each; the rest train.

    Raises:
      InputError: fewer than three patients.
    """
    patients = sorted({case.patient for case in cases})
    if len(patients) < 3:
        raise InputError(
            f"{len(patients)} patient(s) are too few to train, validate and test on separate ones, which takes 3; "
            "add scans, or name the subsets in `split_file`"
        )
    patients = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    fifth = max(1, round(0.2 * len(patients)))
    subsets = (patients[2 * fifth :], patients[fifth : 2 * fifth], patients[:fifth])
    train_ids, val_ids, test_ids = (tuple(case.id for case in cases if case.patient in subset) for subset in subsets)
    return Split(train_ids, val_ids, test_ids, f"ratio, seed {seed}")


def read_split(path: Path, cases: Sequence[Case] | None = None) -> Split:
    """Reads a split from JSON; a subset that is not named is empty.

    Args:
      path: JSON, {"train": [ids], "val": [ids], "test": [ids]}, and "protocol" where a training wrote it.
      cases: if given, ids are checked against them and no patient may be in two subsets.

    Raises:
      InputError: no such file, not of that form, unknown ids, an id more than once, or a patient in two subsets, which
        only the benchmark's folds may have.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise InputError(f"{path}: cannot read the split ({first_line(error)}); check `split_file`") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({error}); expected {{'train': [ids], 'val': [ids], 'test': [ids]}}"
        ) from error
    protocol = values.pop("protocol", "") if isinstance(values, dict) else ""
    good = isinstance(values, dict) and set(values) <= set(SUBSETS) and "train" in values and isinstance(protocol, str)
    if not good or not all(
        isinstance(ids, list) and all(isinstance(case_id, str) for case_id in ids) for ids in values.values()
    ):
        raise InputError(f'{path}: expected {{"train": [ids], "val": [ids], "test": [ids]}}')
    train, val, test = (tuple(values.get(subset, ())) for subset in SUBSETS)
    split = Split(train, val, test, protocol)
    if doubled := sorted({case_id for case_id, count in Counter((*train, *val, *test)).items() if count > 1}):
        raise InputError(f"{path}: {', '.join(doubled)} in it more than once; leave each case in one subset")
    if cases is not None:
        _check_ids(path, split, cases)
    if cases is not None and not _SPLITS_PATIENTS.match(protocol):
        _check_patients(path, split, cases)
    return split


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if doubled:
        raise ValueError(f"{doubled[0]} is there twice")
    return dict(pairs)


def _check_ids(path: Path, split: Split, cases: Sequence[Case]) -> None:
    known = [case.id for case in cases]
    for case_id in (*split.train, *split.val, *split.test):
        if case_id not in known:
            raise InputError(f"{path}: no case {case_id} in the data; there are {', '.join(known)}")


def _check_patients(where: str | Path, split: Split, cases: Sequence[Case]) -> None:
    patients = {case.id: case.patient for case in cases}
    seen: dict[str, tuple[str, str]] = {}
    for subset in SUBSETS:
        for case_id in getattr(split, subset):
            other_subset, other = seen.setdefault(patients[case_id], (subset, case_id))
            if other_subset != subset:
                raise InputError(
                    f"{where}: {other} ({other_subset}) and {case_id} ({subset}) are one patient; "
                    "put both in one subset of a split file"
                )


def write_split(path: Path, split: Split) -> None:
    """Writes the form that `read_split` reads."""
    values = {name: value for name, value in dataclasses.asdict(split).items() if name in SUBSETS or value}
    write_json(path, values)
