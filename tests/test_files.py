from pathlib import Path

import pytest

from resunet_jax.errors import InputError
from resunet_jax.files import check_output_dir, default_cache_dir, make_output_dir, whole_file, whole_folder, write_text


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
