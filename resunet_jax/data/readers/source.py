"""What a reader finds, and what readers of single files share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from resunet_jax.errors import InputError, first_line
from resunet_jax.files import sha256


class Source(NamedTuple):
    """One scan that a reader has found.

    Attributes:
      path: file or folder.
      name: without suffix; what is written for the scan is named after it.
      series: which of several scans at this path, or "".
      members: the files at this path that the scan consists of, where it is not one file.
      format: in the table of readers; filled in there.
    """

    path: Path
    name: str
    series: str = ""
    members: tuple[str, ...] = ()
    format: str = ""


def by_suffix(suffixes: tuple[str, ...]) -> Callable[[Path], list[Source]]:
    """A reader's `find` for a format of single files, known by their suffix in any case; hidden ones are left out."""

    def one(path: Path) -> list[Source]:
        matching = [suffix for suffix in suffixes if path.name.lower().endswith(suffix)]
        if not matching or path.name.startswith("."):
            return []
        return [Source(path, path.name[: -max(map(len, matching))])]

    def find(path: Path) -> list[Source]:
        try:
            return one(path) or (sorted(s for entry in path.iterdir() for s in one(entry)) if path.is_dir() else [])
        except OSError as error:
            raise InputError(f"{path}: cannot be listed ({first_line(error)}); change its permissions") from error

    return find


def file_digest(source: Source) -> str:
    """SHA-256 of the content, for a scan that is one file."""
    return sha256(source.path)
