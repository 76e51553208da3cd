"""Starting a script, and ending it with one clear line: exit codes, signals, logging."""

import contextlib
import gc
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags

from common import processes
from resunet_jax.errors import InputError, StoppedError, first_line
from resunet_jax.files import check_output_dir, expand_user, make_output_dir

BAD_INPUT = 2
"""Exit code where a file or flag is wrong."""

STOPPED = 75
"""Exit code of a training that was asked to stop and saved its state (EX_TEMPFAIL: the same command resumes)."""

CLOSED_PIPE = 141
"""Exit code where nobody reads what is printed any more (128 + SIGPIPE, as of other programs)."""

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_CACHE_SIZE_VARIABLE = "JAX_COMPILATION_CACHE_MAX_SIZE"
_CACHE_BYTES = 2**30  # what has not been used for longest is deleted first
_FLAG_OF_ARGUMENT = {
    "assumed": "assume",
    "path": "input",
    "subset": "split",
    "target": "task",
    "validated_threshold": "threshold",
}
_FOLDER_ABOVE = {"workdir": "output_dir"}  # where a script chooses the one that holds the other


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; an `InputError` becomes one line and exit code 2, a `StoppedError` 75."""
    _log_to_stderr()
    gc.set_threshold(10_000, 10, 10)  # imports and tracing make many objects and little garbage

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            _quiet_libraries()
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]}; flags look like --name=value")
        try:
            _keep_compiled_programs()
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # of what is printed, as by `| head`; flushing it once more at exit would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(CLOSED_PIPE)
        except (InputError, PermissionError) as error:
            _fail(with_flags(_line(error)))
        except StoppedError as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(STOPPED)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not processes.is_distributed():
                raise
            _end_one_of_several(error)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """As `app.run` parses flags, but with one line and exit code 2 where they are wrong."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        missing = re.findall(r"^flag --(\w+)=None: ", str(error), re.MULTILINE)
        said = f"missing: {', '.join(f'--{name}' for name in missing)}" if missing else first_line(error)
        _fail(f"{said}; see --help")


def _quiet_libraries() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every file, and what it raises
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home folder it uses a temporary one
    for name in ("nibabel.global", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters comes as an `InputError`


def _line(error: InputError | PermissionError) -> str:
    """What is wrong; permissions lack anywhere a path is looked at in a folder that one may not enter."""
    if isinstance(error, InputError):
        return str(error)
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}; check the path and its permissions"


def with_flags(message: str) -> str:
    """A library's message with its `arguments` as the flags that a user of the script knows."""

    def as_flag(match: re.Match[str]) -> str:
        names = (_FLAG_OF_ARGUMENT.get(match[1], match[1]), match[1], f"{match[1]}s", _FOLDER_ABOVE.get(match[1], ""))
        return next((f"--{name}{match[2] or ''}" for name in names if name in flags.FLAGS), match[0])

    return re.sub(r"`(\w+)(=[^`]*)?`", as_flag, message)


class _WithFlags(logging.Formatter):
    """What the library logs, with its arguments as flags."""

    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    _leave(BAD_INPUT)


def _end_one_of_several(error: Exception) -> None:
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        _fail(
            f"another process of this training has ended, or cannot be reached ({first_line(error)}); "
            "start all of them again, they resume from the last checkpoint"
        )
    traceback.print_exception(error)
    _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends the process; at an orderly end, one of several would wait for the others, who wait for it."""
    if processes.is_distributed():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _log_to_stderr() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets another one, not a traceback
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logger = logging.getLogger("resunet_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(_WithFlags("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _keep_compiled_programs() -> None:
    """So that the next run of a script that compiles need not; by the variable, which needs no JAX yet."""
    if "compilation_cache_dir" in flags.FLAGS:
        folder = flags.FLAGS.compilation_cache_dir
        os.environ[_CACHE_VARIABLE] = _writable(expand_user(folder)) if folder else ""
        # Without a bound where the user has no name, as in containers: JAX asks for the owner of each entry.
        os.environ.setdefault(_CACHE_SIZE_VARIABLE, str(_CACHE_BYTES if _user_has_name() else -1))
        if "jax" in sys.modules:
            import jax

            jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE_VARIABLE] or None)
            jax.config.update("jax_compilation_cache_max_size", int(os.environ[_CACHE_SIZE_VARIABLE]))


def _user_has_name() -> bool:
    try:
        import grp
        import pwd

        return bool(pwd.getpwuid(os.getuid()).pw_name and grp.getgrgid(os.getgid()).gr_name)
    except ImportError:  # on Windows, where JAX does not ask
        return True
    except KeyError:
        return False


def _writable(folder: Path) -> str:
    """The folder, or "" and a line where it cannot be written: the script works, and compiles each time."""
    try:
        make_output_dir(folder, "compilation_cache_dir")
        check_output_dir(folder)
        _date_entries(folder)
    except InputError as error:
        logging.getLogger("resunet_jax").warning("compiled programs are not kept: %s", error)
        return ""
    return str(folder)


def _date_entries(folder: Path) -> None:
    """Gives each entry the date of its last use that JAX wants for the bound; older JAX and killed processes gave none.

    Without it nothing would be kept any more.
    """
    for entry in folder.glob("*-cache"):
        date = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
        with contextlib.suppress(OSError):  # of another user, or just deleted by another process
            if not date.exists():
                date.write_bytes(entry.stat().st_mtime_ns.to_bytes(8, "little"))


def stop_signals() -> Callable[[int], bool]:
    """A function that says whether to stop, at the next step after a signal; a second one ends a lone process."""
    if processes.is_distributed():
        return processes.stop_signals()
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: stopping at the next step; once more stops at once", file=sys.stderr)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, receive)
    return lambda step: bool(received)
