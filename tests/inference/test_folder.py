import dataclasses
import shutil
from pathlib import Path

import pytest

from resunet_jax import Segmenter, load_segmenter
from resunet_jax.data.cases import find_cases
from resunet_jax.errors import InputError
from resunet_jax.inference import folder as module
from resunet_jax.inference.folder import find_scans, segment_scans
from resunet_jax.inference.segment import read_ahead
from tests.conftest import Trained


@pytest.fixture(scope="module")
def segmenter(trained: Trained) -> Segmenter:
    return load_segmenter(trained.lung, trained.infection)


@pytest.fixture
def scans(trained: Trained, tmp_path: Path) -> list[Path]:
    """Two good ones about a bad one."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, case in zip(("a.nii", "c.nii"), find_cases(trained.data), strict=False):
        shutil.copy(case.ct, folder / name)
    (folder / "b.nii").write_bytes(b"no scan")
    return find_scans(folder)


def run(scans: list[Path], output: Path, segmenter: Segmenter, **options) -> dict[str, str]:
    """What has become of each scan."""
    words = {}
    for outcome in segment_scans(scans, output, segmenter, **options):
        word = "error" if outcome.error else "before" if outcome.done_before else "now"
        words[outcome.scan.name] = word
        assert all(mask.is_file() for mask in outcome.masks)
        assert bool(outcome.masks) == (word != "error")
    return words


def test_goes_on_after_a_bad_scan_and_skips_finished_ones(segmenter: Segmenter, scans, tmp_path: Path) -> None:
    output = tmp_path / "masks"
    assert run(scans, output, segmenter) == {"a.nii": "now", "b.nii": "error", "c.nii": "now"}
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert run(scans, output, segmenter) == {"a.nii": "before", "b.nii": "error", "c.nii": "before"}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first


def test_segments_again_what_has_changed(segmenter: Segmenter, scans, tmp_path: Path) -> None:
    output, good = tmp_path / "masks", [scans[0], scans[2]]
    run(good, output, segmenter)
    (output / "a_lung.nii.gz").unlink()
    assert run(good, output, segmenter) == {"a.nii": "now", "c.nii": "before"}
    shutil.copy(scans[0], scans[2])
    assert run(good, output, segmenter) == {"a.nii": "before", "c.nii": "now"}
    assert set(run(good, output, segmenter, save_probabilities=True).values()) == {"now"}
    other = dataclasses.replace(segmenter, thresholds={"lung": 0.4})
    assert set(run(good, output, other).values()) == {"now"}
    assert set(run(good, output, other).values()) == {"before"}
    (output / "masks.json").write_text("{")
    assert set(run(good, output, other).values()) == {"now"}


def test_killed_between_two_scans_goes_on_with_the_next(segmenter: Segmenter, scans, tmp_path: Path) -> None:
    outcomes = segment_scans(scans, tmp_path / "masks", segmenter)
    assert next(outcomes).scan == scans[0]
    outcomes.close()
    assert run(scans, tmp_path / "masks", segmenter) == {"a.nii": "before", "b.nii": "error", "c.nii": "now"}


def test_masks_being_replaced_are_not_vouched_for(
    segmenter: Segmenter, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when the masks of another threshold are there and the record is not: the first threshold is due again."""
    output, good = tmp_path / "masks", [scans[0], scans[2]]
    other = dataclasses.replace(segmenter, thresholds={"lung": 0.4})
    run(good, output, segmenter)
    real = module.write_masks

    def write_and_stop(*args, **options):
        real(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_masks", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(good, output, other)
    monkeypatch.undo()
    assert set(run(good, output, segmenter).values()) == {"now"}


def test_next_scan_is_read_while_this_one_is_segmented(
    segmenter: Segmenter, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of the first are not begun before the second is asked for, in another thread."""
    events: list[str] = []
    real_parts, real_write = module.prepared_parts, module.write_masks

    def parts(paths, preprocess):
        for part in real_parts(paths, preprocess):
            events.append(f"read {part.scan.name}")
            yield part

    def write(scan, parts, *args, **options):
        masks = real_write(scan, parts, *args, **options)
        events.append(f"wrote {scan.name}")
        return masks

    monkeypatch.setattr(module, "prepared_parts", parts)
    monkeypatch.setattr(module, "write_masks", write)
    run([scans[0], scans[2]], tmp_path / "masks", segmenter)
    assert sorted(events) == ["read a.nii", "read c.nii", "wrote a.nii", "wrote c.nii"]
    assert events.index("read c.nii") < events.index("wrote a.nii")


def test_read_ahead_gives_the_items_in_order_and_errors_in_their_place() -> None:
    def items():
        yield from range(5)
        raise InputError("five")

    taken = []
    with pytest.raises(InputError, match="five"):
        for item in read_ahead(items()):
            taken.append(item)  # noqa: PERF402
    assert taken == list(range(5))


def test_find_scans(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_scans(tmp_path / "none")
    with pytest.raises(InputError, match=r"no \.nii"):
        find_scans(tmp_path)
    for name in ("b.nii.gz", "a.nii", ".hidden.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_scans(tmp_path)] == ["a.nii", "b.nii.gz"]
    assert find_scans(tmp_path / "a.nii") == [tmp_path / "a.nii"]
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match="the same masks"):
        find_scans(tmp_path)
