"""Runs scripts, each in a fork of one process that has imported what they need: starting Python takes longer.

python tests/forked_scripts.py MODULES

MODULES, separated by commas, are imported first; a name after a minus sign is a module that no script may import. Each
line of standard input is a JSON list [folder, environment, file, arguments...]; for each, a line of standard output is
a JSON list [exit code, stdout, stderr]. Folders in PYTHONPATH are searched; Python runs nothing from them at first.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TIMEOUT_S = 540


def run_forked(folder: str, environment: dict[str, str], file: str, arguments: list[str]) -> tuple[int, str, str]:
    """What a script does in a process of its own, in a folder."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            signal.alarm(TIMEOUT_S)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            os._exit(_exit_code(file, arguments))
        _, status = os.waitpid(pid, 0)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        texts = [(output.seek(0), output.read().decode(encoding))[1] for output in (stdout, stderr)]
    return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def _exit_code(file: str, arguments: list[str]) -> int:
    sys.argv = [file, *arguments]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=os.environ.get("PYTHONIOENCODING", "utf-8"))  # type: ignore[union-attr]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in sys.path]
    sys.path[:1] = [str(Path(file).parent), *added]
    code: Any = 0
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        if name.startswith("-"):
            sys.modules[name[1:]] = None  # type: ignore[assignment]
        else:
            importlib.import_module(name)
    for line in sys.stdin:
        folder, environment, file, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(run_forked(folder, environment, file, arguments)) + "\n")
        sys.stdout.flush()
