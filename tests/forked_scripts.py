"""Runs several scripts, each in a fork of one process that has imported what they need: starting Python takes longer.

python tests/forked_scripts.py MODULES RESULTS < COMMANDS

MODULES, separated by commas, are imported first; a name after a minus sign is a module that no script may import.
COMMANDS is a JSON list of [script, flags...]; for each, RESULTS gets [exit code, stdout, stderr].
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def run_forked(script: str, flags: list[str]) -> tuple[int, str, str]:
    """What a script does in a process of its own."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os._exit(_exit_code(EXPERIMENTS / f"{script}.py", flags))
        _, status = os.waitpid(pid, 0)
        texts = [(file.seek(0), file.read().decode())[1] for file in (stdout, stderr)]
    return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def _exit_code(script: Path, flags: list[str]) -> int:
    sys.argv = [str(script), *flags]
    code: Any = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
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
    sys.path[0] = str(EXPERIMENTS)
    for name in filter(None, sys.argv[1].split(",")):
        if name.startswith("-"):
            sys.modules[name[1:]] = None  # type: ignore[assignment]
        else:
            importlib.import_module(name)
    done = [run_forked(script, flags) for script, *flags in json.load(sys.stdin)]
    Path(sys.argv[2]).write_text(json.dumps(done), encoding="utf-8")
