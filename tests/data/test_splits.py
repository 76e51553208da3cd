import dataclasses
import json
from pathlib import Path

import pytest

from resunet_jax.data.cases import KNOWN_CASES, Case, identify
from resunet_jax.data.splits import (
    FOLD_PROTOCOLS,
    NUM_FOLDS,
    Split,
    SplitRequest,
    make_split,
    original_split,
    patient_five_fold_split,
    ratio_split,
    read_split,
    write_split,
)
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


def test_cases_that_the_default_split_leaves_out_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert make_split([*FULL, *make_cases("mine")]) == original_split(FULL)
    assert "mine: not in the original split, so left out;" in caplog.text


def test_original_needs_the_full_set() -> None:
    with pytest.raises(InputError, match="coronacases_001"):
        original_split(FULL[1:])


def short(ids: tuple[str, ...]) -> set[str]:
    """Names as the data set's description abbreviates them."""
    names = {f"coronacases_{n:03d}": f"c{n:03d}" for n in range(1, 11)}
    doubles = ("radiopaedia_10_", "radiopaedia_29_")
    return {names.get(i) or "r" + (i.split("_", 1)[1] if i.startswith(doubles) else i.split("_")[1]) for i in ids}


def test_benchmark_groups_are_the_published_ones() -> None:
    published = (
        "c008 c007 r36 r4",
        "c009 c004 r14 r7",
        "c010 c001 r10_85902_1 r29_86491_1",
        "c003 c005 r40 r27",
        "c002 c006 r10_85902_3 r29_86490_1",
    )
    for fold, names in enumerate(published):
        few = make_split(FULL, SplitRequest(protocol="few_shot", fold=fold))
        five = make_split(FULL, SplitRequest(protocol="five_fold", fold=fold))
        assert short(few.train) == short(five.test) == set(names.split())
        assert (few.test, few.val) == (five.train, five.val) == (few.test, ())
        assert len(few.test) == 16
        assert f"fold {fold} of 5; folds split patients across sets" in few.protocol


def test_patient_folds_keep_patients_together_and_balance_the_sources() -> None:
    splits = [make_split(FULL, SplitRequest(protocol="patient_five_fold", fold=fold)) for fold in range(NUM_FOLDS)]
    assert sorted(case for split in splits for case in split.test) == sorted(KNOWN_CASES)
    for split in splits:
        assert {identify(i)[2] for i in split.train}.isdisjoint(identify(i)[2] for i in split.test)
        assert sorted(split.train + split.test) == sorted(KNOWN_CASES)
        assert [sum(i.startswith(source) for i in split.test) for source in ("coronacases", "radiopaedia")] == [2, 2]


def test_patient_folds_of_an_incomplete_set_say_so() -> None:
    cases = [case for case in FULL if case.source == "radiopaedia"]
    request = SplitRequest(protocol="patient_five_fold")
    splits = [make_split(cases[2:8], dataclasses.replace(request, fold=fold)) for fold in range(NUM_FOLDS)]
    assert sorted(len(split.test) for split in splits) == [1, 1, 1, 1, 2]
    assert all("only 6 of the full set's 20 cases" in split.protocol for split in splits)
    with pytest.raises(InputError, match=r"4 patient\(s\) are too few for 5 folds"):
        make_split(cases[:6], dataclasses.replace(request, fold=0))
    assert patient_five_fold_split(make_cases(*"abcde"), 0).protocol == "patient_five_fold, fold 0 of 5"


def test_patient_folds_of_several_sources_are_of_one_size() -> None:
    names = ("coronacases_001", "coronacases_002", "coronacases_003", "radiopaedia_1_1_1", "radiopaedia_2_1_1", "other")
    splits = [patient_five_fold_split(make_cases(*names), fold) for fold in range(NUM_FOLDS)]
    assert sorted(len(split.test) for split in splits) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("protocol", ["original", "few_shot", "five_fold"])
def test_missing_cases_are_named_or_marked(protocol) -> None:
    cases = [case for case in FULL if case.id not in ("coronacases_008", "radiopaedia_40_86625_0")]
    request = SplitRequest(protocol=protocol, fold=0 if protocol in FOLD_PROTOCOLS else None)
    with pytest.raises(InputError, match=r"coronacases_008, radiopaedia_40_86625_0 are missing.*`allow_missing`"):
        make_split(cases, request)
    complete = make_split(FULL, request)
    split = make_split(cases, dataclasses.replace(request, allow_missing=True))
    there = {case.id for case in cases}
    for subset in ("train", "val", "test"):
        assert set(getattr(split, subset)) == set(getattr(complete, subset)) & there
    assert "2 of 20 cases missing: coronacases_008, radiopaedia_40_86625_0" in split.protocol


def test_a_subset_that_would_be_empty_is_refused() -> None:
    with pytest.raises(InputError, match="no test case"):
        make_split(FULL[:3], SplitRequest(protocol="original", allow_missing=True))
    with pytest.raises(InputError, match="no training case"):
        make_split([FULL[9], FULL[19]], SplitRequest(protocol="original", allow_missing=True))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SplitRequest(protocol="five_fold"), "needs `fold`"),
        (SplitRequest(protocol="five_fold", fold=5), "from 0 to 4; got 5"),
        (SplitRequest(protocol="original", fold=1), "has no folds"),
        (SplitRequest(protocol="five_fold", fold=1, split_seed=3), "drop `split_seed`"),
        (SplitRequest(Path("split.json"), protocol="ratio"), "`split_file` decides alone"),
        (SplitRequest(Path("split.json"), allow_missing=True), "`split_file` decides alone"),
        (SplitRequest(protocol="ratio", allow_missing=True), "takes whatever is there; drop `allow_missing`"),
    ],
)
def test_contradictions_are_refused(request_: SplitRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_split(FULL, request_)


@pytest.mark.parametrize("protocol", FOLD_PROTOCOLS)
def test_protocol_travels_with_the_file(protocol, tmp_path: Path) -> None:
    split = make_split(FULL, SplitRequest(protocol=protocol, fold=2))
    write_split(tmp_path / "split.json", split)
    read = read_split(tmp_path / "split.json", FULL)
    assert read == split
    assert read.protocol == split.protocol


def test_subsets_are_compared_in_any_order() -> None:
    split = Split(("a", "b"), (), ("c",))
    assert split.has_subsets_of(Split(("b", "a"), (), ("c",), "by hand"))
    assert not split.has_subsets_of(Split(("a",), ("b",), ("c",)))
    assert not split.has_subsets_of(Split(("a", "b"), (), ("d",)))


def test_splits_into_the_same_subsets_are_equal_however_chosen() -> None:
    split = make_split(FULL, SplitRequest(protocol="patient_five_fold", fold=2))
    assert split == Split(split.train, split.val, split.test)
    assert split != make_split(FULL, SplitRequest(protocol="patient_five_fold", fold=1))


@pytest.mark.parametrize("seed", range(20))
def test_ratio_keeps_patients_together_and_loses_no_case(seed: int) -> None:
    split = ratio_split(FULL, seed)
    subsets = [{identify(case)[2] for case in subset} for subset in (split.train, split.val, split.test)]
    assert all(subsets)
    assert sum(map(len, subsets)) == len(set.union(*subsets))
    assert sorted(split.train + split.val + split.test) == sorted(KNOWN_CASES)


def test_ratio_is_decided_by_its_seed() -> None:
    split = ratio_split(FULL, 3)
    other = ratio_split(FULL[::-1], 3)
    assert all(sorted(getattr(split, subset)) == sorted(getattr(other, subset)) for subset in ("train", "val", "test"))
    assert len({ratio_split(FULL, seed) for seed in range(5)}) > 1
    assert make_split(FULL, SplitRequest(split_seed=3)) == split


def test_ratio_rounds_a_fifth_of_the_patients() -> None:
    split = ratio_split(make_cases(*"abcdefghijklm"), 0)
    assert [len(subset) for subset in (split.train, split.val, split.test)] == [7, 3, 3]


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
        ("{", "cannot be read as JSON"),
        ("[]", "expected"),
        ('{"val": []}', "expected"),
        ('{"train": "coronacases_001"}', "expected"),
        ('{"train": [], "validation": []}', "expected"),
        ('{"train": ["liver_1"]}', "no case liver_1"),
        ('{"train": ["radiopaedia_10_85902_1"], "test": ["radiopaedia_10_85902_3"]}', "are one patient"),
        (
            '{"train": ["radiopaedia_10_85902_1"], "test": ["radiopaedia_10_85902_3"], "protocol": "ratio, seed 0"}',
            "are one patient",
        ),
        ('{"train": ["coronacases_001"], "val": ["coronacases_001"]}', "coronacases_001 in it more than once"),
        (
            '{"train": ["coronacases_001"], "test": ["coronacases_001"], "protocol": "five_fold, fold 0 of 5"}',
            "more than once",
        ),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"train": ["coronacases_001"], "test": [], "test": ["coronacases_002"]}', "test is there twice"),
        (
            '{"train": ["radiopaedia_10_85902_1"], "test": ["radiopaedia_10_85902_3"], "protocol": "few_shot by me"}',
            "are one patient",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_split(path, FULL)


def test_a_file_of_an_editor_that_marks_utf_8(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text('{"train": ["coronacases_001"]}', encoding="utf-8-sig")
    assert read_split(tmp_path / "split.json", FULL).train == ("coronacases_001",)


def test_the_original_split_keeps_patients_together() -> None:
    one = {"coronacases_001", "coronacases_010"}
    cases = [dataclasses.replace(case, patient="p" if case.id in one else case.patient) for case in FULL]
    with pytest.raises(
        InputError, match=r"`protocol=original`: coronacases_001 \(train\) and coronacases_010 \(test\)"
    ):
        make_split(cases)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the split"):
        read_split(tmp_path / "none.json")


def test_cases_of_a_subset() -> None:
    split = Split(("coronacases_001",), ("coronacases_002",), ())
    assert [case.id for case in split.cases("val", FULL)] == ["coronacases_002"]
    with pytest.raises(InputError, match="no test case"):
        split.cases("test", FULL)
    with pytest.raises(InputError, match="coronacases_002"):
        split.cases("val", FULL[:1])
