"""The command `resunet-jax`, from the clone and from a wheel outside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from resunet_jax import __version__
from tests.conftest import ROOT

SCRIPTS = (
    "ablate",
    "calibrate",
    "check_data",
    "convert_torch",
    "cross_validate",
    "evaluate",
    "export",
    "export_onnx",
    "import_slices",
    "info",
    "make_phantom",
    "predict",
    "quickstart",
    "train_infection",
    "train_lung",
    "train_pretrained",
)


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
        cwd=cwd,
        env={**os.environ, **env},
    )


def assert_lists_the_scripts(text: str) -> None:
    listed = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    assert [name for name, _ in listed] == list(SCRIPTS)
    assert dict(listed)["train_lung"] == "Trains the lung model."


def test_the_command_from_the_clone(tmp_path: Path) -> None:
    main = ROOT / "experiments" / "main.py"
    assert_lists_the_scripts(run(main, cwd=tmp_path, PYTHONIOENCODING="ascii").stdout)
    unknown = run(main, "segment", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == f"error: there is no script segment; there are {', '.join(SCRIPTS)}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as a build leaves folders where it works."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("resunet_jax", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", copy / "dist")
    built = run("-m", "pip", "wheel", *options, copy, cwd=copy)
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheel unpacked into folders that nobody may write."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    yield folder
    for path in folders:
        path.chmod(0o755)


def test_the_wheel_has_the_scripts_and_neither_benchmarks_nor_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (entry_points,) = [file.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    assert wheel.name == f"resunet_jax-{__version__}-py3-none-any.whl"
    assert "resunet-jax = resunet_jax_scripts.main:main" in entry_points.splitlines()
    assert {f"resunet_jax_scripts/{name}.py" for name in SCRIPTS} <= set(names)
    assert {f"resunet_jax_scripts/common/{name}.py" for name in ("__init__", "run", "settings", "processes")} <= set(
        names
    )
    library = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "resunet_jax").rglob("*")  # with the page's files and the shipped models
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wheel.stat().st_size < 10e6
    assert library <= set(names)
    top = {name.split("/")[0] for name in names}
    assert top == {"resunet_jax", "resunet_jax_scripts", f"resunet_jax-{__version__}.dist-info"}
    assert not [name for name in names if "benchmarks/" in name or "test" in name.rsplit("/", 1)[-1]]


def test_the_command_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return run("-m", "resunet_jax_scripts.main", *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    where = "import resunet_jax, resunet_jax_scripts as s; print(resunet_jax.__file__, s.__path__[0], sep='\\n')"
    for line in run("-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.splitlines():
        assert Path(line).is_relative_to(installed)
    assert command("--version").stdout == f"resunet-jax {__version__}\n"
    assert_lists_the_scripts(command().stdout)
    made = command("make_phantom", "--small", "--output_dir=phantom")
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "phantom" / "ct_scans").iterdir())) == 6
    checked = command("check_data", "--data_dir=phantom")
    assert checked.stdout.endswith("training can start\n"), checked.stderr
    assert "--lung_checkpoint:" in command("predict", "--help").stdout
    scan = next((tmp_path / "phantom" / "ct_scans").iterdir())
    segmented = command("predict", f"--input={scan}", "--output_dir=out", "--compilation_cache_dir=")
    assert segmented.returncode == 0, segmented.stderr
    assert (tmp_path / "out" / f"{scan.stem}_report.html").is_file()
    assert "For research, not for diagnosis" in command("info").stdout
    absent = command("predict", "--input=none.nii", "--output_dir=masks", "--lung_checkpoint=lung")
    assert absent.returncode == 2
    assert absent.stderr == "error: none.nii: no such file or folder; check the path\n"
