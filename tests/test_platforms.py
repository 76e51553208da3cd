"""What other systems lack or do otherwise, simulated.

Some users have no home folder, or one that they cannot write. macOS has no `posix_fallocate`; Windows has no `fcntl`,
prints in a code page of its own, and refuses to rename over a file that somebody has open; on both, names ignore case.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax import InputError, Predictor, load_predictor, segment_scan, segment_scans
from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import find_sources
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.files import atomic_dir, write_text
from tests.conftest import ROOT, Trained, run_file, run_script

OTHER_SYSTEM = """
import os, sys
del os.posix_fallocate
sys.modules["fcntl"] = None
import ctypes
load_library = ctypes.CDLL.__init__
def load_named_library(self, name, *args, **kwargs):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    load_library(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = load_named_library
"""

HOLD_A_FOLDER_TWICE = """
import os, sys
from pathlib import Path
from resunet_jax.errors import LockedError
from resunet_jax.files import dir_lock
assert not hasattr(os, "posix_fallocate") and sys.modules["fcntl"] is None
for _ in range(2):
    with dir_lock(Path(sys.argv[1])):
        try:
            with dir_lock(Path(sys.argv[1])):
                print("held twice")
        except LockedError as error:
            print(error)
"""


@pytest.fixture
def other_system(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python lacks what other systems lack, and prints as a Western Windows console does."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OTHER_SYSTEM, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "PYTHONIOENCODING": "cp1252"}


@pytest.fixture
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained.lung, None)


@pytest.fixture
def scan(trained: Trained) -> Path:
    return trained.data / "ct_scans" / "coronacases_org_001.nii"


def test_predicts_without_what_linux_alone_has(
    trained: Trained, predictor: Predictor, scan: Path, other_system: dict[str, str], tmp_path: Path
) -> None:
    named = tmp_path / "肺 größer.nii"
    shutil.copy(scan, named)
    flags = (f"--input={named}", f"--output_dir={tmp_path / 'masks'}", f"--lung_checkpoint={trained.lung}")
    # In a folder of its own: where others have locked by `fcntl`, locks of another kind are waited for.
    result = run_script("predict", *flags, f"--compilation_cache_dir={tmp_path / 'compiled'}", env=other_system)
    assert result.returncode == 0, result.stderr
    assert r"\u80ba größer_lung.nii.gz" in result.stdout
    (expected,) = segment_scan(scan, tmp_path / "expected", predictor)
    (written,) = (tmp_path / "masks").glob("*.nii.gz")
    np.testing.assert_array_equal(nib.load(written).dataobj, nib.load(expected).dataobj)


def test_a_folder_is_held_without_fcntl(other_system: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLD_A_FOLDER_TWICE, tmp_path / "held"],
        capture_output=True,
        encoding="cp1252",
        check=False,
        env={**os.environ, **other_system},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("works in it; wait for it, or choose another folder" in line for line in lines)


def refuse_to_rename_once(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Lets the next rename to a name that ends so fail, as Windows does where the old file is open elsewhere."""
    real, refused = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if target.name.endswith(suffix) and not refused:
            refused.append(target)
            raise PermissionError(13, "Access is denied", str(self), 5, str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_a_file_that_is_open_elsewhere_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    write_text(file, "old")
    refuse_to_rename_once(monkeypatch, ".json")
    with pytest.raises(InputError, match=r"metrics\.json: cannot be written \(Access is denied\); choose"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write_text(file, "new")
    assert file.read_text() == "new"


def test_a_folder_that_cannot_be_renamed_vanishes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse_to_rename_once(monkeypatch, "model")
    with (
        pytest.raises(InputError, match=r"model: cannot be written \(Access is denied\)"),
        atomic_dir(tmp_path / "model") as partial,
    ):
        (partial / "config.json").touch()
    assert not list(tmp_path.iterdir())


def test_a_mask_that_is_open_elsewhere_fails_alone(
    monkeypatch: pytest.MonkeyPatch, predictor: Predictor, scan: Path, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("first", "second"):
        shutil.copy(scan, scans / f"{name}.nii")
    sources, output = find_sources(scans), tmp_path / "masks"
    list(segment_scans(sources, output, predictor))
    image = nib.load(scan)
    values = np.asarray(image.dataobj).copy()
    values[0, 0, 0] += 1
    nib.save(nib.Nifti1Image(values, image.affine, image.header), scans / "first.nii")
    before = {path.name: path.read_bytes() for path in output.glob("*.nii.gz")}
    refuse_to_rename_once(monkeypatch, "first_lung.nii.gz")
    failed, skipped = sorted(segment_scans(sources, output, predictor), key=lambda result: result.scan.name)
    assert "first_lung.nii.gz: cannot be written (Access is denied)" in str(failed.error)
    assert skipped.skipped
    assert {path.name: path.read_bytes() for path in output.glob("*.nii.gz")} == before
    assert {path.name for path in output.iterdir()} == {*before, "masks.json", ".locks"}
    assert [result.skipped for result in segment_scans(sources, output, predictor)] == [False, True]  # done now


def test_scans_whose_names_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    for name in ("lung.nii", "LUNG.nii.gz", "other.nii"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"LUNG\.nii\.gz and lung\.nii would write the same masks"):
        find_sources(tmp_path)
    (tmp_path / "lung.nii").unlink()
    assert [source.name for source in find_sources(tmp_path)] == ["LUNG", "other"]


NO_HOME = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""


@pytest.fixture
def without_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a user without HOME and without an entry in the list of users, as in containers."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_HOME, encoding="utf-8")
    cache = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE")
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", *cache):
        monkeypatch.delenv(name, raising=False)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "temporary").mkdir()
    return {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "temporary")}


def assert_is_one_line(text: str, *parts: str) -> None:
    assert text.count("\n") == 1, text
    for part in parts:
        assert part in text


def without_warning_of_the_model(stderr: str) -> str:
    """The tiny model finds too little lung, which is warned of."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "the lungs measure" not in line)


def test_works_without_a_home_folder(
    trained: Trained, scan: Path, without_home: dict[str, str], tmp_path: Path
) -> None:
    flags = (f"--input={scan}", f"--lung_checkpoint={trained.lung}")
    keep_all = {**without_home, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    both = (*flags, f"--infection_checkpoint={trained.infection}", "--gate=none")
    result = run_script("predict", *both, f"--output_dir={tmp_path / 'masks'}", env=keep_all)
    assert (result.returncode, without_warning_of_the_model(result.stderr)) == (0, "")
    programs = list((tmp_path / "temporary" / "resunet_jax" / "compiled").glob("*-cache"))
    assert len(programs) > 1  # JAX looks at the first of them where it keeps the second
    result = run_script("predict", *flags, "--output_dir=~/masks", env=without_home)
    assert result.returncode == 2
    assert_is_one_line(result.stderr, "error: ~/masks: the home folder is not known; set HOME, or give the whole path")
    result = run_script("predict", *flags[:1], "--lung_checkpoint=~/lung", "--output_dir=masks", env=without_home)
    assert result.returncode == 2
    assert_is_one_line(result.stderr, "error: ~/lung: the home folder is not known")


def unwritable(tmp_path: Path) -> Path:
    """A folder that nobody can make anything in, root included: it is a file."""
    (tmp_path / "home").touch()
    return tmp_path / "home"


def test_a_home_that_cannot_be_written_is_named_with_the_flag_that_helps(
    trained: Trained, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    home = unwritable(tmp_path)
    env = {"HOME": str(home), "USERPROFILE": str(home), "XDG_CACHE_HOME": ""}
    flags = (f"--lung_checkpoint={trained.lung}", f"--output_dir={tmp_path / 'out'}")
    result = run_script("predict", f"--input={scan}", *flags, env=env)
    assert result.returncode == 0  # each time it compiles
    cache = f"{home}/.cache/resunet_jax"
    stderr = without_warning_of_the_model(result.stderr)
    assert_is_one_line(stderr, f"{cache}/compiled: cannot be written", "--compilation_cache_dir")
    data = f"--data_dir={trained.data}"
    result = run_script("evaluate", data, *flags, "--compilation_cache_dir=", env=env)
    assert result.returncode == 2
    assert_is_one_line(result.stderr, f"error: {cache}: cannot be written", "with --cache_dir")


def test_a_cache_that_cannot_be_written_is_named_with_its_argument(trained: Trained, tmp_path: Path) -> None:
    cases = find_cases(trained.data)[:1]
    with pytest.raises(InputError, match=r"home/cache: cannot be written \(.*\); .* with `cache_dir`"):
        prepare_cases(cases, PreprocessConfig(image_size=16), unwritable(tmp_path) / "cache")


def test_a_cache_that_can_no_longer_be_written_is_named_with_its_argument(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resunet_jax.data.slice_cache.np.save", full)
    cases = find_cases(trained.data)[:1]
    with pytest.raises(InputError, match=r"No space left on device\); choose another folder with `cache_dir`"):
        prepare_cases(cases, PreprocessConfig(image_size=16), tmp_path / "cache")


def test_a_folder_that_one_may_not_enter_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from common import run\n"
        "def main():\n    raise PermissionError(13, 'Permission denied', '/a/metadata.csv')\n"
        "run.run(main)\n"
    )
    result = run_file(script, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments")])})
    assert result.returncode == 2
    assert result.stderr == "error: /a/metadata.csv: Permission denied; check the path and its permissions\n"


BOUND = """
import os
from absl import flags
from common import run, settings
settings.define_compilation_cache_flag()
def main():
    import jax
    print(jax.config.jax_compilation_cache_max_size)
run.run(main)
"""


@pytest.mark.parametrize("user", [None, "12345678"])
def test_compiled_programs_have_a_bound_unless_the_user_sets_one(tmp_path: Path, user: str | None) -> None:
    """Entries without a date, which older versions and killed processes leave, would end the keeping."""
    (tmp_path / "jit_step-0-cache").write_bytes(b"program")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments")])}
    env.pop("JAX_COMPILATION_CACHE_MAX_SIZE", None)
    env |= {} if user is None else {"JAX_COMPILATION_CACHE_MAX_SIZE": user}
    command = [sys.executable, "-c", BOUND, f"--compilation_cache_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == (user or str(2**30))
    date = int.from_bytes((tmp_path / "jit_step-0-atime").read_bytes(), "little")
    assert date == (tmp_path / "jit_step-0-cache").stat().st_mtime_ns
