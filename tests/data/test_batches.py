from pathlib import Path

import grain
import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data import batches
from resunet_jax.data.batches import ProcessShard, SliceSource, eval_batches, train_batches
from resunet_jax.data.cases import find_cases
from resunet_jax.data.slice_cache import prepare_cases

ONE_PROCESS = ProcessShard(lambda batch: batch)


@pytest.fixture(scope="module")
def prepared(phantom: Path, tmp_path_factory: pytest.TempPathFactory):
    cases = find_cases(phantom)[1:4]  # 12, 12 and 9 slices
    return prepare_cases(cases, PreprocessConfig(image_size=16), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def source(prepared) -> SliceSource:
    return SliceSource(prepared, "lung")


def test_source_is_the_slices_in_order(source: SliceSource, prepared) -> None:
    assert len(source) == 33
    for index, case, k in ((0, 0, 0), (11, 0, 11), (12, 1, 0), (24, 2, 0), (32, 2, 8)):
        batch = source.batch(np.array([index]), 1)
        np.testing.assert_array_equal(batch["image"][0], prepared[case].images[k])
        np.testing.assert_array_equal(batch["mask"][0, ..., :1], prepared[case].lung[k])
        np.testing.assert_array_equal(batch["mask"][0, ..., 1:], prepared[case].infection[k])
    assert (batch["image"].shape, batch["mask"].shape) == ((1, 16, 16, 1), (1, 16, 16, 2))
    assert (batch["image"].dtype, batch["mask"].dtype) == (np.float32, np.uint8)


def take(source: SliceSource, batches: int, seed: int, start: int = 0, **shard) -> list[list[int]]:
    iterator = train_batches(source, 4, seed, ProcessShard(lambda batch: batch, **shard), start)
    taken = [next(iterator)["index"].tolist() for _ in range(batches)]
    iterator.close()
    return taken


def test_each_slice_once_before_any_twice(source: SliceSource) -> None:
    flat = [index for batch in take(source, 33, seed=0) for index in batch]  # four epochs
    for epoch in range(4):
        assert sorted(flat[33 * epoch : 33 * (epoch + 1)]) == list(range(33))
    assert flat[:33] != flat[33:66]


def test_order_is_decided_by_the_seed(source: SliceSource) -> None:
    assert take(source, 9, seed=1) == take(source, 9, seed=1)
    assert take(source, 9, seed=1) != take(source, 9, seed=2)


@pytest.mark.parametrize("start", [0, 1, 5, 40])
def test_resumes_from_any_batch(source: SliceSource, start: int) -> None:
    assert take(source, 6, seed=0, start=start) == take(source, start + 6, seed=0)[start:]


def test_order_does_not_depend_on_the_number_of_threads(source: SliceSource, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(source, 20, seed=0)
    for threads in (0, 1, 4, 16):
        monkeypatch.setattr(batches, "_READ", grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16))
        assert take(source, 20, seed=0) == expected


def test_processes_read_their_shards_of_each_batch(source: SliceSource) -> None:
    whole = take(source, 10, seed=0)
    shards = [take(source, 10, seed=0, process=process, processes=2) for process in (0, 1)]
    assert [first + second for first, second in zip(*shards, strict=True)] == whole
    evaluated = [list(eval_batches(source, 8, ProcessShard(lambda x: x, process, 2))) for process in (0, 1)]
    valid = [[int(batch["valid"].sum()) for batch in batches] for batches in evaluated]
    assert valid == [[4, 4, 4, 4, 1], [4, 4, 4, 4, 0]]


def test_slices_have_names(source: SliceSource) -> None:
    assert source.names([0, 11, 12, 32]) == [
        "coronacases_002 slice 0",
        "coronacases_002 slice 11",
        "coronacases_003 slice 0",
        "radiopaedia_10_85902_1 slice 8",
    ]


def test_checkpointing_as_grain_tests_it(source: SliceSource) -> None:
    grain.experimental.assert_equal_output_after_checkpoint(eval_batches(source, 8, ONE_PROCESS))


def test_evaluation_pads_the_last_batch_and_marks_the_padding(source: SliceSource) -> None:
    batches = list(eval_batches(source, 8, ONE_PROCESS))
    assert [int(batch["valid"].sum()) for batch in batches] == [8, 8, 8, 8, 1]
    assert {batch["image"].shape for batch in batches} == {(8, 16, 16, 1)}
    order = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    np.testing.assert_array_equal(order, np.arange(33))
