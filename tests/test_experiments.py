"""The scripts as a user runs them: the whole way, and each bad input."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax import load_model, save_model
from tests.conftest import ROOT, TINY_FLAGS, Trained, run_script

TRAINING = (
    "recipe set image_size batch_size filters epochs learning_rate seed loss split_seed split_file normalization "
    "patience patch_factor data_dir workdir cache_dir protocol fold allow_missing dtype remat accumulate_steps "
    "compilation_cache_dir"
)


@pytest.mark.slow
def test_the_whole_way(phantom: Path, tmp_path: Path) -> None:
    common = (f"--data_dir={phantom}", f"--cache_dir={tmp_path / 'cache'}", *TINY_FLAGS, "--split_seed=1")
    common += ("--recipe=original", "--set=augment.quarter_turn=0.5")
    lung = ("train_lung", *common, f"--workdir={tmp_path / 'lung'}")
    infection = (
        "train_infection",
        *common,
        f"--workdir={tmp_path / 'infection'}",
        f"--lung_checkpoint={tmp_path / 'lung'}",
    )
    for command in ((*lung, "--epochs=1"), (*lung, "--epochs=2"), (*infection, "--epochs=1")):
        result = run_script(*command)
        assert result.returncode == 0, result.stderr
    assert "resuming" not in result.stderr
    assert len((tmp_path / "lung" / "metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((tmp_path / "lung" / "config.json").read_text())
    assert (config["augment"]["quarter_turn"], config["preprocess"]["normalization"]) == (0.5, "minmax")
    assert config["train"]["learning_rate"] == 3e-3  # a flag overrides the recipe
    checkpoints = (f"--lung_checkpoint={tmp_path / 'lung'}", f"--infection_checkpoint={tmp_path / 'infection'}")

    report = tmp_path / "report"
    data = (f"--data_dir={phantom}", f"--cache_dir={tmp_path / 'cache'}")
    result = run_script("evaluate", *data, *checkpoints, "--split=test", f"--output_dir={report}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((report / "metrics.json").read_text())
    test_cases = json.loads((tmp_path / "lung" / "split.json").read_text())["test"]
    assert [(row["case"], row["structure"]) for row in metrics["volumes"]] == [
        (case, structure) for case in test_cases for structure in ("lung", "left_lung", "right_lung", "infection")
    ]
    assert all(case in result.stdout for case in test_cases)

    scans = tmp_path / "scans"
    shutil.copytree(phantom / "ct_scans", scans)
    for file in list(scans.iterdir())[2:]:
        file.unlink()
    good = sorted(path.name.removesuffix(".nii") for path in scans.iterdir())
    (scans / "bad.nii").write_bytes(b"not a scan")
    masks = tmp_path / "masks"
    compiled = f"--compilation_cache_dir={tmp_path / 'compiled'}"
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # a fast machine has nothing else worth keeping
    result = run_script("predict", f"--input={scans}", f"--output_dir={masks}", *checkpoints, compiled, env=everything)
    assert result.returncode == 2, result.stderr
    assert any((tmp_path / "compiled").iterdir())
    assert "2 of 3 scans segmented" in result.stdout
    first_error = next(line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert first_error.startswith(f"error: {scans}/bad.nii")
    expected = [f"{name}_{structure}.nii.gz" for name in good for structure in ("lung", "infection")]
    assert sorted(path.name for path in masks.iterdir()) == sorted([*expected, "masks.json"])

    (masks / expected[0]).unlink()
    again = run_script("predict", f"--input={scans}", f"--output_dir={masks}", *checkpoints, compiled)
    assert again.returncode == 2
    assert again.stdout.count("(done before)") == 2
    assert "2 of 3 scans segmented, 1 of them before" in again.stdout
    assert (masks / expected[0]).is_file()


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    command = ("quickstart", "--small", "--epochs=1", f"--output_dir={tmp_path / 'run'}")
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report" / "overlays.png").stat().st_size > 10_000
    assert f"report: {tmp_path / 'run' / 'report'}" in result.stdout
    assert result.stdout.count("radiopaedia_14_85914_0") >= 2


def test_make_phantom_refuses_an_existing_folder(tmp_path: Path) -> None:
    result = run_script("make_phantom", "--small", f"--output_dir={tmp_path}")
    assert_one_clear_line(result, "exists already")


def test_check_data(phantom: Path, tmp_path: Path) -> None:
    result = run_script("check_data", f"--data_dir={phantom}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("lung (1, 2)") == 6
    assert result.stdout.endswith("training can start\n")

    shutil.copytree(phantom, tmp_path / "set")
    bad = tmp_path / "set" / "lung_mask" / "coronacases_001.nii"
    bad.write_bytes(bad.read_bytes()[:1000])
    result = run_script("check_data", f"--data_dir={tmp_path / 'set'}", "--json")
    assert result.returncode == 1, result.stderr
    check = json.loads(result.stdout)
    assert not check["can_train"]
    assert str(bad) in check["findings"][0]["text"]

    assert_one_clear_line(run_script("check_data", f"--data_dir={tmp_path / 'none'}"), "no such folder")


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("train_lung", TRAINING),
        ("train_infection", f"{TRAINING} lung_checkpoint ct_only"),
        (
            "evaluate",
            "data_dir output_dir lung_checkpoint split split_file cache_dir threshold smallest_region "
            "infection_tolerance_mm",
        ),
        (
            "predict",
            "input output_dir lung_checkpoint infection_checkpoint probabilities smallest_region compilation_cache_dir",
        ),
        ("cross_validate", "data_dir workdir cache_dir protocol allow_missing filters epochs"),
        ("ablate", "data_dir workdir cache_dir protocol split_files rows seeds set filters epochs"),
        ("convert_torch", "task input output_dir output_file"),
        ("check_data", "data_dir json"),
        ("benchmark", "suite rounds json"),
    ],
)
def test_help_explains_every_flag(script: str, names: str) -> None:
    text = run_script(script, "--help").stdout
    for name in names.split():
        assert re.search(rf"--(\[no\])?{name}:", text), name


def test_public_names_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, resunet_jax as r\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
        "assert set(r.__all__) <= set(dir(r))\n"
        "for name in r.__all__: assert getattr(r, name).__module__.startswith('resunet_jax.'), name\n"
        "from resunet_jax import *\n"
        "assert cascade is r.cascade\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_readme_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def assert_one_clear_line(result: subprocess.CompletedProcess[str], message: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(message, errors[0]), errors[0]


# Each bad input: (root, trained) -> script, flags, message, and a folder that must not come into being.
Bad = tuple[str, list[str], str, Path | None]


def copy_phantom(root: Path, trained: Trained) -> Path:
    shutil.copytree(trained.data, root / "data")
    return root / "data"


def train_flags(root: Path, data: Path) -> list[str]:
    return [
        f"--data_dir={data}",
        f"--workdir={root / 'run'}",
        f"--cache_dir={root / 'cache'}",
        *TINY_FLAGS,
        "--epochs=1",
    ]


def bad_no_data_folder(root: Path, trained: Trained) -> Bad:
    return "train_lung", train_flags(root, root / "none"), "no such folder.*--data_dir", root / "run"


def bad_empty_folder(root: Path, trained: Trained) -> Bad:
    return "train_lung", train_flags(root, root), "neither metadata.csv nor a folder", root / "run"


def bad_csv_columns(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    (data / "metadata.csv").write_text("ct_scan,mask\na,b\n")
    return "train_lung", train_flags(root, data), r"metadata\.csv: no column lung_mask", root / "run"


def bad_missing_mask(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    (data / "lung_mask" / "coronacases_002.nii").unlink()
    return "train_lung", train_flags(root, data), r"lung_mask/coronacases_002\.nii: no such file", root / "run"


def bad_missing_infection_mask(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    (data / "metadata.csv").unlink()
    (data / "infection_mask" / "coronacases_002.nii").unlink()
    flags = [*train_flags(root, data), f"--lung_checkpoint={trained.lung}", f"--split_file={trained.split_file}"]
    return "train_infection", flags, "coronacases_002: no infection mask", root / "run"


def bad_double_mask(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    (data / "metadata.csv").unlink()
    shutil.copy(data / "lung_mask" / "coronacases_001.nii", data / "lung_mask" / "coronacases_org_001.nii")
    return "train_lung", train_flags(root, data), "both match case coronacases_001", root / "run"


def _change_mask(data: Path, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
    path = data / "lung_mask" / "coronacases_001.nii"
    image = nib.load(path)
    changed = change(nib.Nifti1Image(np.asarray(image.dataobj).copy(), image.affine))
    nib.save(changed, path)


def bad_mask_shape(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    _change_mask(data, lambda image: image.slicer[:, :, :-1])
    return "train_lung", train_flags(root, data), r"coronacases_001\.nii: shape", root / "run"


def bad_mask_affine(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    _change_mask(data, lambda image: nib.Nifti1Image(image.dataobj, image.affine @ np.diag([1, 1, 1.1, 1])))
    return "train_lung", train_flags(root, data), r"coronacases_001\.nii: its affine differs", root / "run"


def bad_truncated(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    path = data / "ct_scans" / "coronacases_org_001.nii"
    path.write_bytes(path.read_bytes()[:-1000])
    return "train_lung", train_flags(root, data), r"coronacases_org_001\.nii.*cut off", root / "run"


def bad_image_size(root: Path, trained: Trained) -> Bad:
    flags = [*train_flags(root, trained.data), "--image_size=100"]
    return "train_lung", flags, "image_size is 100; it must be a positive multiple of 8", root / "run"


def bad_filters(root: Path, trained: Trained) -> Bad:
    flags = [*train_flags(root, trained.data), "--filters=64,many"]
    return "train_lung", flags, "--filters=64,many", root / "run"


def bad_setting(root: Path, trained: Trained) -> Bad:
    return "train_lung", [*train_flags(root, trained.data), "--set=max_zoom"], "--set=max_zoom: wanted", root / "run"


def bad_no_splits(root: Path, trained: Trained) -> Bad:
    flags = [f"--data_dir={trained.data}", f"--workdir={root / 'run'}"]
    return "ablate", flags, "give either --protocol or --split_files", root / "run"


def bad_few_patients(root: Path, trained: Trained) -> Bad:
    data = copy_phantom(root, trained)
    lines = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join(lines[:3]) + "\n")
    return "train_lung", train_flags(root, data), r"2 patient\(s\) are too few", root / "run"


def bad_absent_checkpoint(root: Path, trained: Trained) -> Bad:
    flags = [*train_flags(root, trained.data), f"--lung_checkpoint={root / 'none'}"]
    return "train_infection", flags, "none: no such checkpoint folder", root / "run"


def bad_no_lung_checkpoint(root: Path, trained: Trained) -> Bad:
    return "train_infection", train_flags(root, trained.data), "--lung_checkpoint, or --ct_only", root / "run"


def bad_other_task(root: Path, trained: Trained) -> Bad:
    flags = [*train_flags(root, trained.data), f"--lung_checkpoint={trained.infection}"]
    return "train_infection", flags, "wants a lung model, this one segments infection", root / "run"


def bad_other_architecture(root: Path, trained: Trained) -> Bad:
    lung = load_model(trained.lung)
    save_model(root / "model", lung.variables, lung.config)
    config = json.loads((root / "model" / "config.json").read_text())
    config["model"]["filters"] = [8, 16, 32, 64]
    (root / "model" / "config.json").write_text(json.dumps(config))
    (root / "model" / "files.json").unlink()
    scan = trained.data / "ct_scans" / "coronacases_org_001.nii"
    flags = [f"--input={scan}", f"--output_dir={root / 'out'}", f"--lung_checkpoint={root / 'model'}"]
    return "predict", flags, "another architecture", root / "out"


def bad_other_preprocessing(root: Path, trained: Trained) -> Bad:
    flags = [*train_flags(root, trained.data), f"--lung_checkpoint={trained.lung}", "--normalization=minmax"]
    return "train_infection", flags, "the same --recipe, --image_size and --normalization", root / "run"


def bad_output_folder(root: Path, trained: Trained) -> Bad:
    (root / "file").touch()
    flags = [f"--data_dir={trained.data}", f"--cache_dir={trained.cache}", f"--lung_checkpoint={trained.lung}"]
    return "evaluate", [*flags, f"--output_dir={root / 'file' / 'out'}"], "out: cannot be written", None


def bad_workdir(root: Path, trained: Trained) -> Bad:
    (root / "file").touch()
    flags = [*train_flags(root, trained.data), f"--workdir={root / 'file' / 'run'}"]
    return "train_lung", flags, "run: cannot be written", None


def bad_output_is_input(root: Path, trained: Trained) -> Bad:
    shutil.copytree(trained.data / "ct_scans", root / "scans")
    flags = [f"--input={root / 'scans'}", f"--output_dir={root / 'scans'}", f"--lung_checkpoint={trained.lung}"]
    return "predict", flags, "is the input folder", None


def bad_scans(root: Path, trained: Trained) -> Bad:
    """Every kind of unusable scan in one folder; predict names each and writes nothing."""
    scans = root / "scans"
    scans.mkdir()
    values = np.random.default_rng(0).integers(-1000, 200, (16, 16, 4)).astype(np.float32)
    with_nan = values.copy()
    with_nan[3, 3, 1] = np.nan
    rgb = np.zeros((16, 16, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    arrays = {"nan": with_nan, "constant": np.zeros_like(values), "four_d": np.stack([values] * 2, -1), "rgb": rgb}
    for name, array in arrays.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), scans / f"{name}.nii")
    (scans / "text.nii.gz").write_bytes(b"not a scan")
    flags = [f"--input={scans}", f"--output_dir={root / 'out'}", f"--lung_checkpoint={trained.lung}"]
    return "predict", flags, "", None


BAD = [value for name, value in list(globals().items()) if name.startswith("bad_")]


@pytest.fixture(scope="module")
def outcomes(trained: Trained, tmp_path_factory: pytest.TempPathFactory):
    """All bad inputs, two scripts at a time: starting Python takes most of the time."""

    def outcome(make: Callable[[Path, Trained], Bad]):
        root = tmp_path_factory.mktemp(make.__name__)
        script, flags, message, absent = make(root, trained)
        return run_script(script, *flags), message, absent, root

    with ThreadPoolExecutor(2) as executor:
        return dict(zip(BAD, executor.map(outcome, BAD), strict=True))


@pytest.mark.parametrize("make", [make for make in BAD if make is not bad_scans])
def test_bad_input_gives_one_clear_line(outcomes, make) -> None:
    result, message, absent, _ = outcomes[make]
    assert_one_clear_line(result, message)
    assert absent is None or not absent.exists()


def test_bad_scans_are_named_one_by_one(outcomes) -> None:
    result, _, _, root = outcomes[bad_scans]
    errors = sorted(line for line in result.stderr.splitlines() if line.startswith("error:"))
    expected = {
        "constant.nii": "every voxel is 0",
        "four_d.nii": "three dimensions",
        "nan.nii": "NaN",
        "rgb.nii": "not colour",
        "text.nii.gz": "cannot be read as NIfTI",
    }
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for line, (name, message) in zip(errors, sorted(expected.items()), strict=True):
        assert name in line
        assert message in line
    assert not (root / "out").exists()
