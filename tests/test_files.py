import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resunet_jax.errors import InputError, LockedError
from resunet_jax.files import (
    atomic_dir,
    atomic_file,
    check_output_dir,
    default_cache_dir,
    dir_lock,
    make_output_dir,
    reserve,
    write_json,
    write_text,
)


def test_a_file_is_written_atomically(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_names_of_any_length_that_a_file_can_have(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 250 + ".json"), "text")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["text"]
    with pytest.raises(InputError, match=r"cannot be written .*; give a shorter name"):
        write_text(tmp_path / ("n" * 256), "text")


def test_a_folder_is_written_atomically(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "a") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):  # what is there already stays
        with atomic_dir(tmp_path / "a") as partial:
            (partial / "file").write_text(text)
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_threads_that_make_a_folder_the_first_one_stays(tmp_path: Path) -> None:
    both_inside = threading.Barrier(2)
    first_done = threading.Event()

    def make(text: str) -> None:
        with atomic_dir(tmp_path / "a") as partial:
            (partial / "file").write_text(text)
            both_inside.wait(60)
            if text == "second":
                assert first_done.wait(60)
        first_done.set()

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(make, ("first", "second")))
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_processes_that_make_a_folder_the_first_one_stays(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from resunet_jax.files import atomic_dir\n"
        "with atomic_dir(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'file').write_text('other')\n"
        "    print('inside', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "inside\n"
        with atomic_dir(tmp_path / "a") as partial:
            (partial / "file").write_text("ours")
        other.communicate("\n", timeout=60)
    assert other.returncode == 0
    assert (tmp_path / "a" / "file").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("has_fallocate", [True, False])
@pytest.mark.parametrize("size", [0, 1, 2**20 + 17, 3 * 2**20])
def test_reserved_files_are_zeros_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, *, has_fallocate: bool
) -> None:
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with (tmp_path / "file").open("w+b") as file:
        reserve(file, size)
        assert file.tell() == 0
        assert (tmp_path / "file").read_bytes() == bytes(size)
        occupied = getattr(os.fstat(file.fileno()), "st_blocks", size) * 512  # Windows does not say
    assert occupied >= size


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1.5, math.nan], "b": ({"c": math.nan}, "nan", 1)})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "é" in text
    assert json.loads(text) == {"é": [1.5, None], "b": [{"c": None}, "nan", 1]}


def test_output_dirs(tmp_path: Path) -> None:
    check_output_dir(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    make_output_dir(tmp_path / "a" / "b")
    make_output_dir(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for function in (check_output_dir, make_output_dir):
        with pytest.raises(InputError, match="cannot be written"):
            function(tmp_path / "file" / "b")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "none" / "a.txt", "")


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere/resunet_jax")


def test_a_lock_is_exclusive_and_released_when_its_process_dies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hold = (
        "import sys, time; from pathlib import Path; from resunet_jax.files import dir_lock\n"
        "with dir_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=rf"run: process {other.pid} on .* works in it; wait for it"),
            dir_lock(folder),
        ):
            pass
        other.kill()
        other.wait()
    assert (folder / ".lock").exists()
    with dir_lock(folder):
        (folder / "result").touch()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "result"]
    with dir_lock(folder), pytest.raises(InputError, match="works in it"), dir_lock(folder):
        pass


def test_of_several_threads_one_holds_a_folder_and_the_others_are_refused(tmp_path: Path) -> None:
    """Also while the holder's note is being written or deleted."""
    inside: list[int] = []

    def hold_again_and_again(worker: int) -> int:
        held = 0
        for _ in range(200):
            with contextlib.suppress(LockedError), dir_lock(tmp_path / "run"):
                inside.append(worker)
                assert inside == [worker]
                inside.remove(worker)
                held += 1
        return held

    with ThreadPoolExecutor(4) as executor:
        assert sum(executor.map(hold_again_and_again, range(4))) > 0


def test_a_file_in_the_place_of_a_folder_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="run: cannot be written"), dir_lock(tmp_path / "run"):
        pass


def test_a_released_folder_keeps_nothing_but_an_empty_lock(tmp_path: Path) -> None:
    with dir_lock(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "run" / ".lock").read_bytes()


@pytest.mark.parametrize("make", [atomic_file, atomic_dir])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, make) -> None:
    """Of any name, on this machine, by a process that is dead; nothing else."""
    code = (
        "import os, sys; from pathlib import Path; from resunet_jax.files import *\n"
        f"with {make.__name__}(Path(sys.argv[1])) as partial:\n"
        "    partial.mkdir(exist_ok=True)\n"
        "    (partial / 'half').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "result"], check=False)
    (left,) = tmp_path.iterdir()
    left.with_name(left.name.replace("result", "other")).mkdir()
    alive = left.with_name(re.sub(r"-\d+-([0-9a-f]+)-result", rf"-{os.getpid()}-\1-result", left.name))
    others = [alive, left.with_name(".partial-elsewhere-1-result")]
    for other in others:
        other.mkdir()
    with make(tmp_path / "result") as partial:
        if make is atomic_file:
            partial.touch()
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "result"])
