"""Atomic files and folders, folders that one process holds, and room on disk; on Linux, macOS and Windows."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from resunet_jax.errors import InputError, LockedError, first_line

_LOCK = ".lock"
_HOLDER = ".lock-holder"
_PARTIAL = ".partial-"
_LONG_NAME = 100  # bytes, of the 255 that a name may have
_ZEROS = bytes(2**20)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file gets its name, and is on disk, when the block ends well, and vanishes if not.

    Raises:
      InputError: it cannot be written.
    """
    partial = _partial(path)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path, argument: str = "") -> Iterator[Path]:
    """A folder to fill; it gets its name, and is on disk, when the block ends well, and vanishes if not.

    If `path` has come into being in the meantime, it is left as it is. `argument`, by which its place is chosen, is for
    the message.

    Raises:
      InputError: it cannot be written.
    """
    partial = _partial(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        for entry in (*partial.rglob("*"), partial):
            _sync(entry)
        try:
            partial.replace(path)
        except OSError:
            if not path.is_dir():  # otherwise somebody else was first
                raise
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error, argument) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_dir(path: Path) -> bool:
    """Removes a folder atomically; whether it could be: on Windows not while one of its files is open."""
    gone = _partial(path)
    try:
        path.replace(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows has no descriptor for a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _partial(path: Path) -> Path:
    """Where `path` is written first: next to it, under a unique name. Removes what killed processes left there."""
    ours = f"{_PARTIAL}{_machine()}-"
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
        match = re.match(rf"{re.escape(ours)}(\d+)-[0-9a-f]+-", leftover.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(leftover, ignore_errors=True)
            with contextlib.suppress(OSError):
                leftover.unlink()
    return path.with_name(f"{ours}{os.getpid()}-{uuid.uuid4().hex[:8]}-{_short(path.name)}")


def _short(name: str) -> str:
    """A file's name; of a long one its digest and end, as a prefix would not fit before the whole."""
    content = name.encode(errors="surrogateescape")
    return name if len(content) <= _LONG_NAME else hashlib.sha256(content).hexdigest()[:16] + name[-8:]


def is_leftover(path: Path) -> bool:
    """Whether a killed process left it, in a folder in which no other one writes."""
    return path.name.startswith(_PARTIAL)


def _machine() -> str:
    """Where a process id means something: this machine, whatever its name, and on Linux this container."""
    namespace, machine = Path("/proc/self/ns/pid"), Path("/etc/machine-id")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    identity = hashlib.sha256(machine.read_bytes() if machine.is_file() else b"").hexdigest()[:8]
    return f"{socket.gethostname()}-{identity}-{inode}"


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def dir_lock(folder: Path) -> Iterator[None]:
    """Holds a folder, created where it is missing, against other processes; a process that dies lets go of it.

    Raises:
      LockedError: another process holds it.
      InputError: it cannot be created.
    """
    holder = folder / _HOLDER
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / _LOCK, timeout=0))
        except Timeout as error:
            who = "another process"  # has not written its name yet, or has just let go
            with contextlib.suppress(OSError):
                who = holder.read_text(encoding="utf-8")
            raise LockedError(f"{folder}: {who} works in it; wait for it, or choose another folder") from error
        except OSError as error:
            raise _cannot_write(folder, error) from error
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def reserve(file: IO[Any], size: int) -> None:
    """Makes an empty open file `size` bytes long, of zeros that have their place on disk.

    Raises:
      OSError: there is no room.
    """
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(_ZEROS)):
        file.write(_ZEROS[: size - start])
    file.seek(0)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, as UTF-8.

    Raises:
      InputError: it cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")


def json_text(value: Any) -> str:
    """JSON of dicts, lists and plain values, indented; see `without_nan`."""
    return json.dumps(without_nan(value), indent=2, ensure_ascii=False) + "\n"


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text` atomically.

    Raises:
      InputError: it cannot be written.
    """
    write_text(path, json_text(value))


def read_json(path: Path, remedy: str, *keys: str) -> dict[str, Any]:
    """A JSON object that has at least these keys.

    Raises:
      InputError: it cannot be read, or is no such object; with the remedy.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {**values, **{key: values[key] for key in keys}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_absent(path: Path, what: str = "folder") -> None:
    """Refuses to write over what is there; the message says of `what` the user is to choose a new one.

    Raises:
      InputError: it exists.
    """
    if path.exists():
        raise InputError(f"{path}: exists already; choose a new {what}")


def check_output_dir(path: Path) -> None:
    """Checks, before long work and without making anything, that a folder can be made and written.

    Raises:
      InputError: it cannot.
    """
    path = path.absolute()
    ancestor = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not ancestor.is_dir():
        raise InputError(f"{path}: cannot be written ({ancestor} is not a folder); choose another folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written (no permission in {ancestor}); choose another folder")


def make_output_dir(path: Path, argument: str = "") -> None:
    """Makes a folder, or takes the one that is there; `argument`, by which it is chosen, is for the message.

    Raises:
      InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error, argument) from error


def _cannot_write(path: Path, error: OSError, argument: str = "") -> InputError:
    remedy = f"choose another folder with `{argument}`" if argument else "choose another folder"
    if error.errno == errno.ENAMETOOLONG:
        remedy = "give a shorter name"
    return InputError(f"{path}: cannot be written ({first_line(error)}); {remedy}")


def expand_user(path: str | Path) -> Path:
    """A path whose ~ is the home folder.

    Raises:
      InputError: nobody knows the home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: the home folder is not known; set HOME, or give the whole path") from error


def default_cache_dir() -> Path:
    """For what may be deleted at any time: $XDG_CACHE_HOME/resunet_jax, ~/.cache/resunet_jax, or a temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path.home() / ".cache") / "resunet_jax"
    except RuntimeError:  # a user without a home folder
        return Path(tempfile.gettempdir()) / "resunet_jax"
