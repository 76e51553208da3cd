"""The command `resunet-jax`: one subcommand for each script, with the same flags.

resunet-jax predict --input=SCAN --output_dir=masks
"""

import ast
import runpy
import sys
from pathlib import Path

from resunet_jax import __version__

_HERE = Path(__file__).resolve().parent


def main() -> None:
    """Runs a script as `python experiments/SCRIPT.py` does."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("--version", "version"):
        print(f"resunet-jax {__version__}")
    elif command in ("--help", "-h", "help"):
        print("usage: resunet-jax SCRIPT --flag=value ... (SCRIPT --help lists the flags)\n")
        for name, path in _scripts().items():
            print(f"  {name:16} {_first_line(path)}")
    elif command in _scripts():
        sys.argv = [f"resunet-jax {command}", *sys.argv[2:]]
        sys.path.insert(0, str(_HERE))
        runpy.run_path(str(_scripts()[command]), run_name="__main__")
    else:
        print(f"error: there is no script {command}; there are {', '.join(_scripts())}", file=sys.stderr)
        sys.exit(2)


def _scripts() -> dict[str, Path]:
    hidden = ("__init__", "main", "benchmark")  # the benchmark needs its folder, which is not installed
    return {path.stem: path for path in sorted(_HERE.glob("*.py")) if path.stem not in hidden}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


if __name__ == "__main__":
    main()
