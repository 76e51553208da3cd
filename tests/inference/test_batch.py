import contextlib
import dataclasses
import itertools
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import pytest
from filelock import FileLock

from resunet_jax import Predictor, load_predictor
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import READERS, Reader, Source, find_sources
from resunet_jax.data.readers.source import by_suffix, file_digest
from resunet_jax.errors import InputError
from resunet_jax.inference import batch as module
from resunet_jax.inference.batch import MANIFEST, Output, Summary, segment_scans
from resunet_jax.inference.scan import prefetch, segment_scan
from tests.conftest import Trained


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, trained.infection)


@pytest.fixture
def scans(trained: Trained, tmp_path: Path) -> list[Source]:
    """Two good ones, a bad one between them."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, case in zip(("a.nii", "c.nii"), find_cases(trained.data), strict=False):
        shutil.copy(case.ct, folder / name)
    (folder / "b.nii").write_bytes(b"no scan")
    return find_sources(folder)


def run(scans: list[Source], output: Path, predictor: Predictor, **options) -> dict[str, str]:
    """What has become of each scan."""
    words = {}
    for result in segment_scans(scans, output, predictor, **options):
        word = "error" if result.error else "before" if result.skipped else "now"
        words[result.scan.path.name] = word
        assert all(mask.is_file() for mask in result.masks)
        assert bool(result.masks) == (word != "error")
    return words


def test_a_bad_scan_does_not_end_the_batch_and_finished_ones_are_skipped(
    predictor: Predictor, scans, tmp_path: Path
) -> None:
    output = tmp_path / "masks"
    assert run(scans, output, predictor) == {"a.nii": "now", "b.nii": "error", "c.nii": "now"}
    first = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert run(scans, output, predictor) == {"a.nii": "before", "b.nii": "error", "c.nii": "before"}
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == first


@pytest.mark.parametrize(
    "error", [OSError(116, "Stale file handle"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
@pytest.mark.parametrize("function", ["open_scan", "segment_opened"])
def test_what_else_ends_one_scan_does_not_end_the_batch(
    predictor: Predictor, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    real = getattr(module, function)

    def fail_at_a(*args, **kwargs):
        if any(getattr(arg, "name", arg) == "a" for arg in args):
            raise error
        return real(*args, **kwargs)

    def write(source: Source, segmented: object, seconds: float, folder: Path) -> Summary:
        (folder / f"{source.name}.txt").touch()
        return Summary("")

    outputs = {"report": Output((".txt",), write)}
    assert run(scans, tmp_path / "masks", predictor, outputs=outputs)["a.nii"] == "now"
    monkeypatch.setattr(module, function, fail_at_a)
    found = run(scans, tmp_path / "masks", predictor, outputs={"report": outputs["report"]._replace(settings=1)})
    assert found == {"a.nii": "error", "b.nii": "error", "c.nii": "now"}
    assert (tmp_path / "masks" / "a.txt").exists() == (function == "open_scan")  # nothing is known to be wrong with it


def test_segments_again_what_has_changed(predictor: Predictor, scans, tmp_path: Path) -> None:
    output, good = tmp_path / "masks", [scans[0], scans[2]]
    run(good, output, predictor)
    (output / "a_lung.nii.gz").unlink()
    assert run(good, output, predictor) == {"a.nii": "now", "c.nii": "before"}
    shutil.copy(scans[0].path, scans[2].path)
    assert run(good, output, predictor) == {"a.nii": "before", "c.nii": "now"}
    assert set(run(good, output, predictor, save_probabilities=True).values()) == {"now"}
    other = dataclasses.replace(predictor, thresholds={"lung": 0.4})
    assert set(run(good, output, other).values()) == {"now"}
    assert set(run(good, output, other).values()) == {"before"}


def test_files_of_a_folder_that_is_not_its_own_are_not_replaced(predictor: Predictor, scans, tmp_path: Path) -> None:
    """Masks by hand, beside the scan, of which another one is segmented first."""
    folder, good = scans[0].path.parent, [scans[0], scans[2]]
    own = folder / "c_lung.nii.gz"
    own.write_bytes(b"mine")
    first, refused = segment_scans(good, folder, predictor)
    assert first.error is None
    assert f"{own}: would be replaced, though no masks.json there says" in str(refused.error)
    assert own.read_bytes() == b"mine"
    own.unlink()
    assert run(good, folder, predictor) == {"a.nii": "before", "c.nii": "now"}


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}, "scans": {"a.nii": 5}}', '{"scans": {}}'])
def test_a_manifest_that_cannot_be_read_is_named(predictor: Predictor, scans, tmp_path: Path, text: str) -> None:
    """Without it nothing protects masks from those of another scan."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=r"masks\.json: cannot be read .*; restore it, or choose another `output_dir`"):
        run(scans, tmp_path / "masks", predictor)


def test_a_write_that_fails_leaves_the_masks_of_before(
    predictor: Predictor, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, not some beside new ones."""
    run(scans[:1], tmp_path / "masks", predictor)
    before = {path: path.read_bytes() for path in (tmp_path / "masks").glob("*.nii.gz")}
    real, calls = shutil.copyfileobj, itertools.count()

    def copy(*arguments) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr("resunet_jax.data.readers.nifti.shutil.copyfileobj", copy)
    other = dataclasses.replace(predictor, thresholds={"lung": 0.3, "infection": 0.3})
    (result,) = segment_scans(scans[:1], tmp_path / "masks", other)
    assert re.search(r"a_(lung|infection)\.nii\.gz: cannot be written \(No space left", str(result.error))
    assert {path: path.read_bytes() for path in (tmp_path / "masks").glob("*.nii.gz")} == before
    assert run(scans[:1], tmp_path / "masks", other) == {"a.nii": "now"}


@pytest.mark.parametrize("name", ["masks.json", "n" * 226])
def test_a_scan_may_have_any_name(predictor: Predictor, scans, tmp_path: Path, name: str) -> None:
    path = scans[0].path.rename(tmp_path / f"{name}.nii")
    assert run(find_sources(path), tmp_path / "masks", predictor) == {path.name: "now"}
    assert (tmp_path / "masks" / f"{name}_lung.nii.gz").is_file()
    longer = path.rename(tmp_path / ("n" * 227 + ".nii"))
    (result,) = segment_scans(find_sources(longer), tmp_path / "masks", predictor)
    assert "n.nii: too long a name for those of its masks to begin with; shorten it" in str(result.error)


@contextlib.contextmanager
def stopped_among_masks() -> Iterator[None]:
    """Runs are stopped once the masks of a scan are written, before the manifest is."""
    real = module.segment_opened

    def segment_and_stop(*args, **options):
        real(*args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "segment_opened", segment_and_stop)
        yield


def test_a_first_run_that_was_killed_among_masks_goes_on(
    predictor: Predictor, scans, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stopped_among_masks():
        run(scans[:1], tmp_path / "masks", predictor)
    assert (tmp_path / "masks" / "a_lung.nii.gz").exists()
    caplog.set_level("INFO")
    assert run(scans[:1], tmp_path / "masks", predictor) == {"a.nii": "now"}
    assert "of other models, settings" not in caplog.text


def test_an_output_that_is_refused_replaces_nothing(predictor: Predictor, scans, tmp_path: Path) -> None:
    """A mistyped flag does not cost what is done."""
    output = tmp_path / "masks"
    run(scans[:1], output, predictor)
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}

    def refuse(*_) -> None:
        raise InputError("no")

    (result,) = segment_scans(
        scans[:1], output, predictor, outputs={"x": Output((), lambda *_: Summary(), check=refuse)}
    )
    assert str(result.error) == "no"
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert run(scans[:1], output, predictor) == {"a.nii": "before"}


def test_masks_that_something_else_has_written_are_made_again(predictor: Predictor, scans, tmp_path: Path) -> None:
    output = tmp_path / "masks"
    run(scans[:1], output, predictor)
    first = (output / "a_lung.nii.gz").read_bytes()
    segment_scan(scans[0].path, output, dataclasses.replace(predictor, thresholds={"lung": 0.3}))
    assert (output / "a_lung.nii.gz").read_bytes() != first
    assert run(scans[:1], output, predictor) == {"a.nii": "now"}
    assert (output / "a_lung.nii.gz").read_bytes() == first


def test_stopped_between_two_scans_resumes_with_the_next(predictor: Predictor, scans, tmp_path: Path) -> None:
    results = segment_scans(scans, tmp_path / "masks", predictor)
    assert next(results).scan == scans[0]
    results.close()
    assert run(scans, tmp_path / "masks", predictor) == {"a.nii": "before", "b.nii": "error", "c.nii": "now"}


def test_masks_being_replaced_are_not_listed(predictor: Predictor, scans, tmp_path: Path) -> None:
    """Stopped between masks of another threshold and the manifest: the first threshold is due again."""
    output, good = tmp_path / "masks", [scans[0], scans[2]]
    other = dataclasses.replace(predictor, thresholds={"lung": 0.4})
    run(good, output, predictor)
    with stopped_among_masks():
        run(good, output, other)
    assert set(run(good, output, predictor).values()) == {"now"}


def test_next_scan_is_opened_while_this_one_is_segmented(
    predictor: Predictor, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks of the first wait until the second is open, in another thread."""
    second_is_open = threading.Event()
    real_open, real_segment = module.open_scan, module.segment_opened

    @contextlib.contextmanager
    def open_and_say(source, *args, **options):
        with real_open(source, *args, **options) as scan:
            if source == scans[2]:
                second_is_open.set()
            yield scan

    def segment(*args, **options):
        assert second_is_open.wait(60)
        return real_segment(*args, **options)

    monkeypatch.setattr(module, "open_scan", open_and_say)
    monkeypatch.setattr(module, "segment_opened", segment)
    assert run([scans[0], scans[2]], tmp_path / "masks", predictor) == {"a.nii": "now", "c.nii": "now"}


def test_a_scan_that_another_process_is_at_is_left_until_last(predictor: Predictor, scans, tmp_path: Path) -> None:
    """It is taken over when the other lets go, as it does when it is killed."""
    output, good = tmp_path / "masks", [scans[0], scans[2]]
    lock = FileLock(output / ".locks" / "a.lock", thread_local=False)
    (output / ".locks").mkdir(parents=True)
    order = []
    with lock:
        for result in segment_scans(good, output, predictor):
            order.append(result.scan.path.name)
            lock.release(force=True)
    assert order == ["c.nii", "a.nii"]
    assert run(good, output, predictor) == {"a.nii": "before", "c.nii": "before"}


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends a signal to a thread")
def test_an_interruption_ends_the_wait_for_another_process(predictor: Predictor, scans, tmp_path: Path) -> None:
    output = tmp_path / "masks"
    (output / ".locks").mkdir(parents=True)
    before = set(threading.enumerate())
    interruption = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    with FileLock(output / ".locks" / "a.lock", thread_local=False):
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
        try:
            interruption.start()
            with pytest.raises(KeyboardInterrupt):
                list(segment_scans(scans[:1], output, predictor))
        finally:
            signal.signal(signal.SIGINT, handler)
        for thread in set(threading.enumerate()) - before:
            thread.join(30)
            assert not thread.is_alive()


def test_another_scan_of_the_same_name_is_refused(
    predictor: Predictor, scans, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the models, and of whom the masks of before are; of the same file name it may be changed, and is named.

    When masks are gone, they are no longer listed.
    """
    output, (first, _, second) = tmp_path / "masks", scans
    other = second._replace(path=tmp_path / "A.nii.gz", name="a")
    shutil.copy(second.path, tmp_path / "plain.nii")
    nib.save(nib.load(tmp_path / "plain.nii"), other.path)
    run([first], output, predictor)
    others = dataclasses.replace(predictor, thresholds={"lung": 0.4})
    for models in (predictor, others):
        (result,) = segment_scans([other], output, models)
        what = f"{output / 'a_lung.nii.gz'}: is of another scan, a.nii, than {other.path}"
        assert str(result.error) == f"{what}; choose another `output_dir`"
    third = second._replace(path=shutil.copy(second.path, tmp_path / "d.nii"), name="d")
    assert run([third], output, others) == {"d.nii": "now"}  # masks.json is of these settings from now on
    assert run([other], output, others) == {"A.nii.gz": "error"}
    assert not caplog.text
    shutil.copytree(first.path.parent, tmp_path / "later")
    shutil.copy(second.path, tmp_path / "later" / "a.nii")
    later = find_sources(tmp_path / "later" / "a.nii")
    assert run(later, output, predictor) == {"a.nii": "now"}
    assert "a_lung.nii.gz: is of another scan, a.nii, than" in caplog.text
    moved = other._replace(path=shutil.copy(second.path, tmp_path / "A.nii"))
    assert run([moved], output, predictor) == {"A.nii": "now"}  # the same content
    assert run([first], output, predictor) == {"a.nii": "error"}
    for mask in output.glob("*.nii.gz"):
        mask.unlink()
    assert run([first], output, predictor) == {"a.nii": "now"}
    assert run([first], output, predictor) == {"a.nii": "before"}
    for mask in output.glob("*.nii.gz"):
        mask.unlink()
    assert run([other], output, predictor) == {"A.nii.gz": "now"}
    assert run([first], output, predictor) == {"a.nii": "error"}


def test_locks_that_cannot_be_made_are_named(
    predictor: Predictor, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    results = list(segment_scans(scans, tmp_path / "masks", predictor))
    assert [Path(str(result.error).split(":")[0]).name for result in results] == ["a.lock", "b.lock", "c.lock"]
    assert all("Permission denied" in str(result.error) for result in results)


@pytest.mark.parametrize("path", [".", ".."])
def test_a_folder_that_is_named_by_dots_has_its_own_name(
    path: str, scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(folder: Path) -> list[Source]:
        return [Source(folder, "folder", members=("x",))] if folder.is_dir() else []

    (tmp_path / "scans" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "scans" / ("sub" if path == ".." else ""))
    readers = {"folders": Reader(find, lambda source: None, file_digest)}
    (source,) = find_sources(path, readers)
    assert source.path == tmp_path / "scans"


def test_prefetch_gives_the_items_in_order_and_errors_in_their_place() -> None:
    def items():
        yield from range(5)
        raise InputError("five")

    taken = []
    with pytest.raises(InputError, match="five"):
        for item in prefetch(items()):
            taken.append(item)  # noqa: PERF402
    assert taken == list(range(5))


def test_a_reader_of_the_table_is_used(predictor: Predictor, scans, tmp_path: Path) -> None:
    """The phantom's scans under another suffix, which the table's own reader does not find."""
    renamed = tmp_path / "other" / "a.toy"
    renamed.parent.mkdir()
    shutil.copy(scans[0].path, tmp_path / "other" / "b.nii")
    shutil.copy(scans[0].path, renamed)

    @contextlib.contextmanager
    def open_toy(source: Source):
        plain = source.path.with_name("b.nii")
        with READERS["nifti"].open(source._replace(path=plain)) as scan:
            yield scan

    readers = {"toy": Reader(by_suffix((".toy",)), open_toy, file_digest)}
    toy = find_sources(renamed, readers)
    (result,) = segment_scans(toy, tmp_path / "masks", predictor, readers=readers)
    assert result.error is None
    assert [path.name for path in result.masks] == ["a_lung.nii.gz", "a_infection.nii.gz"]
    (plain,) = segment_scans(find_sources(tmp_path / "other" / "b.nii"), tmp_path / "masks", predictor)
    assert [path.read_bytes() for path in result.masks] == [path.read_bytes() for path in plain.masks]


def test_find_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_sources(tmp_path / "none")
    with pytest.raises(InputError, match="no scan in it; formats that are read: nifti"):
        find_sources(tmp_path)
    for name in ("b.nii.gz", "a.nii", ".hidden.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert [source.path.name for source in find_sources(tmp_path)] == ["a.nii", "b.nii.gz"]
    assert find_sources(tmp_path / "a.nii") == [Source(tmp_path / "a.nii", "a", format="nifti")]
    with pytest.raises(InputError, match=r"notes\.txt: not a scan"):
        find_sources(tmp_path / "notes.txt")
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match="the same masks"):
        find_sources(tmp_path)
