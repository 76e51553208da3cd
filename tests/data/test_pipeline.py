from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.pipeline import SliceSource, eval_batches, train_batches
from resunet_jax.data.prepared import prepare_cases


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
        np.testing.assert_array_equal(source[index]["image"][..., 0], prepared[case].images[k])
        np.testing.assert_array_equal(source[index]["mask"][..., 0], prepared[case].lung[k])
    record = source[5]
    assert record["image"].shape == record["mask"].shape == (16, 16, 1)
    assert (record["image"].dtype, record["mask"].dtype) == (np.float32, np.uint8)
    assert "33 slices of coronacases_002" in repr(source)


def take(source: SliceSource, batches: int, seed: int) -> list[list[int]]:
    iterator = train_batches(source, 4, seed, jax.devices()[0])
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


def test_state_can_be_saved_and_restored(source: SliceSource) -> None:
    iterator = train_batches(source, 4, 0, jax.devices()[0])
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["index"].tolist() for _ in range(6)]
    iterator.close()
    fresh = train_batches(source, 4, 0, jax.devices()[0])
    fresh.set_state(state)
    assert [next(fresh)["index"].tolist() for _ in range(6)] == expected
    fresh.close()


def test_checkpointing_as_grain_tests_it(source: SliceSource) -> None:
    grain.experimental.assert_equal_output_after_checkpoint(eval_batches(source, 8))


def test_evaluation_pads_the_last_batch_and_says_so(source: SliceSource) -> None:
    batches = list(eval_batches(source, 8))
    assert [int(batch["valid"].sum()) for batch in batches] == [8, 8, 8, 8, 1]
    assert {batch["image"].shape for batch in batches} == {(8, 16, 16, 1)}
    order = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    np.testing.assert_array_equal(order, np.arange(33))
