"""Exceptions for input that a person can fix, and for a training that was asked to stop."""


class InputError(Exception):
    """A file, flag or setting is wrong; the message is one line that names it and the remedy.

    The scripts in `experiments/` print the message and leave with exit code 2. Library users may catch it.
    """


class LockedError(InputError):
    """Another process works in the folder; the message says which."""


class StoppedError(Exception):
    """A training was asked to stop and has saved its state; the message says where."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 200 characters, to quote in an `InputError`.

    Of an `OSError` the reason alone, as the message names the file.
    """
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:200]
