"""Results that are there whole or not at all, and folders that one process holds."""

import contextlib
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from resunet_jax.errors import HeldError, InputError

_ATTEMPTS = 100  # to hold a folder that others are just letting go


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file gets its name when the block ends well, and vanishes if not.

    Raises:
      InputError: it cannot be written.
    """
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name when the block ends well, and vanishes if not.

    If `path` has come into being in the meantime, it is left as it is.

    Raises:
      InputError: it cannot be written.
    """
    partial = _partial(path)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if not path.is_dir():
            partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    """Where `path` is written first: beside it, with its suffix. Removes what a killed process left there."""
    ours = f".partial-{socket.gethostname()}-"
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
        match = re.fullmatch(rf"{re.escape(ours)}(\d+)-{re.escape(path.name)}", leftover.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(leftover, ignore_errors=True)
            with contextlib.suppress(OSError):
                leftover.unlink()
    return path.with_name(f"{ours}{os.getpid()}-{path.name}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, made if need be, against other processes; the system lets go of it when this one dies.

    Raises:
      HeldError: another process holds it.
      InputError: it cannot be made.
    """
    file = folder / ".lock"
    with contextlib.ExitStack() as stack:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(file.open("a+", encoding="utf-8"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(file.stat(), os.fstat(lock.fileno())):
                    break  # otherwise the holder before has just removed it, and another one has made it again
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise HeldError(f"{folder}: {holder} works in it; wait for it, or choose another folder") from error
            except OSError as error:
                # The holder before may just have removed it, which does not happen again and again.
                if attempt == _ATTEMPTS or not isinstance(error, FileNotFoundError | FileExistsError):
                    raise _cannot_write(folder, error) from error
        else:
            raise HeldError(f"{folder}: other processes take turns in it; wait for them, or choose another folder")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing has come into it


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all, as UTF-8.

    Raises:
      InputError: it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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


def make_output_dir(path: Path) -> None:
    """Makes a folder, or takes the one that is there.

    Raises:
      InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}); choose another folder")


def default_cache_dir() -> Path:
    """For what may be deleted at any time: $XDG_CACHE_HOME/resunet_jax, or ~/.cache/resunet_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resunet_jax"
