import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resunet_jax.errors import HeldError, InputError
from resunet_jax.files import (
    check_output_dir,
    default_cache_dir,
    locked,
    make_output_dir,
    whole_file,
    whole_folder,
    write_text,
)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):  # what is there already stays
        with whole_folder(tmp_path / "a") as partial:
            (partial / "file").write_text(text)
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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


def test_folder_is_held_by_one_process_and_let_go_when_it_dies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hold = (
        "import sys, time; from pathlib import Path; from resunet_jax.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=rf"run: process {other.pid} on .* works in it; wait for it"),
            locked(folder),
        ):
            pass
        other.kill()
        other.wait()
    assert (folder / ".lock").exists()
    with locked(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with locked(folder), pytest.raises(InputError, match="works in it"), locked(folder):
        pass


def test_of_many_who_want_a_folder_one_holds_it_and_the_others_hear_so(tmp_path: Path) -> None:
    """While the holder takes its lock away, too: nobody sees a file that is just gone."""
    inside: list[int] = []

    def hold_again_and_again(worker: int) -> int:
        held = 0
        for _ in range(200):
            with contextlib.suppress(HeldError), locked(tmp_path / "run"):
                inside.append(worker)
                assert inside == [worker]
                inside.remove(worker)
                held += 1
        return held

    with ThreadPoolExecutor(4) as executor:
        assert sum(executor.map(hold_again_and_again, range(4))) > 0


def test_a_file_in_the_place_of_a_folder_cannot_be_held(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="run: cannot be written"), locked(tmp_path / "run"):
        pass


def test_held_folder_vanishes_when_nothing_came_into_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [whole_file, whole_folder])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, make) -> None:
    """Of the same name, on this machine, by a process that is dead; nothing else."""
    code = (
        "import os, sys; from pathlib import Path; from resunet_jax.files import *\n"
        f"with {make.__name__}(Path(sys.argv[1])) as partial:\n"
        "    partial.mkdir(exist_ok=True)\n"
        "    (partial / 'half').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "result"], check=False)
    (left,) = tmp_path.iterdir()
    others = [left.with_name(left.name.replace("result", "other")), left.with_name(".partial-elsewhere-1-result")]
    for other in others:
        other.mkdir()
    with make(tmp_path / "result") as partial:
        if make is whole_file:
            partial.touch()
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "result"])
