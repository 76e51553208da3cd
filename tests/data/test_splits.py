import json
from pathlib import Path

import pytest

from resunet_jax.data.cases import KNOWN_CASES, Case, identify
from resunet_jax.data.splits import Split, make_split, original_split, ratio_split, read_split, write_split
from resunet_jax.errors import InputError


def make_cases(*ids: str) -> list[Case]:
    return [Case(i, *identify(i)[1:], Path(i), Path(i), Path(i)) for i in ids]


FULL = make_cases(*KNOWN_CASES)


def test_full_set_is_split_as_the_original_did() -> None:
    split = make_split(FULL)
    assert split == original_split(FULL)
    assert split.val == ("coronacases_009", "radiopaedia_4_85506_1")
    assert split.test == ("coronacases_010", "radiopaedia_7_85703_0")
    assert len(split.train) == 16


def test_original_needs_the_full_set() -> None:
    with pytest.raises(InputError, match="coronacases_001"):
        original_split(FULL[1:])


@pytest.mark.parametrize("seed", range(20))
def test_ratio_never_parts_a_patient_and_loses_nobody(seed: int) -> None:
    split = ratio_split(FULL, seed)
    parts = [{identify(case)[2] for case in part} for part in (split.train, split.val, split.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert sorted(split.train + split.val + split.test) == sorted(KNOWN_CASES)


def test_ratio_is_decided_by_its_seed() -> None:
    split = ratio_split(FULL, 3)
    for part, other in zip(vars(split).values(), vars(ratio_split(FULL[::-1], 3)).values(), strict=True):
        assert sorted(part) == sorted(other)
    assert len({ratio_split(FULL, seed) for seed in range(5)}) > 1
    assert make_split(FULL, split_seed=3) == split


def test_too_few_patients() -> None:
    cases = make_cases("radiopaedia_10_85902_1", "radiopaedia_10_85902_3", "coronacases_001")
    with pytest.raises(InputError, match=r"2 patient\(s\) are too few"):
        ratio_split(cases, 0)


def test_file_round_trip(tmp_path: Path) -> None:
    split = Split(("coronacases_001",), ("coronacases_002",), ())
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json", FULL) == split
    assert json.loads((tmp_path / "split.json").read_text()) == {
        "train": ["coronacases_001"],
        "val": ["coronacases_002"],
        "test": [],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "wanted"),
        ('{"val": []}', "wanted"),
        ('{"train": "coronacases_001"}', "wanted"),
        ('{"train": [], "validation": []}', "wanted"),
        ('{"train": ["liver_1"]}', "no case liver_1"),
        ('{"train": ["radiopaedia_10_85902_1"], "test": ["radiopaedia_10_85902_3"]}', "same patient"),
        ('{"train": ["coronacases_001"], "val": ["coronacases_001"]}', "same patient"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_split(path, FULL)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the split"):
        read_split(tmp_path / "none.json")


def test_parts() -> None:
    split = Split(("coronacases_001",), ("coronacases_002",), ())
    assert [case.id for case in split.cases("val", FULL)] == ["coronacases_002"]
    with pytest.raises(InputError, match="no test case"):
        split.cases("test", FULL)
    with pytest.raises(InputError, match="coronacases_002"):
        split.cases("val", FULL[:1])
