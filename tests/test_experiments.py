"""The scripts as a user runs them: the whole way, and bad inputs."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest

import resunet_jax
from resunet_jax import (
    InputError,
    evaluate,
    find_sources,
    load_model,
    open_scan,
    save_model,
    segment_scans,
    train,
)
from resunet_jax.config import Config, override, to_dict
from resunet_jax.data.splits import Split, SplitRequest, write_split
from resunet_jax.inference.predictor import load_predictor
from resunet_jax.recipes import recipe
from resunet_jax.weights.pretrained import load_pair
from resunet_jax.weights.store import fingerprint
from tests.conftest import (
    ROOT,
    TINY,
    TINY_FLAGS,
    Trained,
    run_file,
    run_forked,
    run_script,
    store_in_window,
    training_flags,
)

TRAINING = (
    "recipe set image_size batch_size filters epochs learning_rate seed loss split_seed split_file normalization "
    "patience patch_grid patch_factor data_dir assume workdir cache_dir protocol fold allow_missing dtype remat "
    "accumulate_steps compilation_cache_dir tensorboard"
)
MODELS = "lung_checkpoint infection_checkpoint threshold infection_threshold min_component_fraction smallest_region"
INITIAL = "initial_lung_checkpoint initial_infection_checkpoint"
FLAGS_OF = {
    "train_lung": f"{TRAINING} initial_checkpoint",
    "train_infection": f"{TRAINING} initial_checkpoint lung_checkpoint ct_only",
    "evaluate": f"{MODELS} data_dir assume output_dir split split_file cache_dir infection_tolerance_mm uncertainty",
    "calibrate": f"{MODELS} data_dir assume output_dir split_file study_dir variant seed cache_dir pair_dir",
    "predict": f"{MODELS} input output_dir probabilities uncertainty report multilabel lobes gate assume",
    "export": "output lung_checkpoint infection_checkpoint threshold infection_threshold from_hu",
    "export_onnx": "output lung_checkpoint infection_checkpoint threshold infection_threshold",
    "train_pretrained": f"data_dir workdir output_dir cache_dir {INITIAL}",
    "info": "output_dir",
    "cross_validate": f"data_dir assume workdir cache_dir protocol allow_missing filters epochs {INITIAL}",
    "ablate": f"data_dir assume workdir cache_dir protocol split_files rows seeds set filters epochs {INITIAL}",
    "convert_torch": "task input output_dir output_file",
    "import_slices": "input output_dir flipped",
    "check_data": "data_dir json assume",
    "make_phantom": "output_dir seed small volumes downsample",
    "quickstart": "output_dir epochs small compilation_cache_dir",
    "benchmark": "suite rounds json",
}


def test_the_pair_is_trained_only_where_it_can_be_saved(phantom: Path, trained: Trained, tmp_path: Path) -> None:
    train = ("train_pretrained", f"--workdir={tmp_path / 'work'}", f"--cache_dir={tmp_path / 'cache'}")
    (tmp_path / "pair").mkdir()
    result = run_script(*train, f"--data_dir={phantom}", f"--output_dir={tmp_path / 'pair'}")
    assert (result.returncode, "exists already; choose a new --output_dir" in result.stderr) == (2, True)
    shutil.copytree(phantom, tmp_path / "data")
    rows = (tmp_path / "data" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    columns = rows[0].split(",")
    first = [v if column != "infection_mask" else "" for column, v in zip(columns, rows[1].split(","), strict=True)]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join([rows[0], ",".join(first), *rows[2:]]), encoding="utf-8")
    result = run_script(*train, f"--data_dir={tmp_path / 'data'}")
    assert (result.returncode, "no infection mask" in result.stderr) == (2, True)
    result = run_script(*train, f"--data_dir={phantom}", f"--initial_infection_checkpoint={trained.infection}")
    assert (result.returncode, "filters (4, 8, 16, 32), not (16, 32" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "work").exists()


def test_the_pair_begins_with_the_models_that_are_given(phantom: Path, tmp_path: Path) -> None:
    """A run that did not is another one."""
    lung, run = load_pair().lung, tmp_path / "work" / "lung"
    save_model(tmp_path / "model", lung.variables, lung.config)
    (run / "checkpoints").mkdir(parents=True)
    config = override(recipe("robust", "lung"), {"model.filters": [16, 32, 64, 128], "train.epochs": 15})
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    folders = (f"--data_dir={phantom}", f"--workdir={tmp_path / 'work'}", f"--cache_dir={tmp_path / 'cache'}")
    result = run_script("train_pretrained", *folders, f"--initial_lung_checkpoint={tmp_path / 'model'}")
    assert result.returncode == 2, result.stderr
    assert f"another run (initial_fingerprint was none, is {fingerprint(lung.variables)});" in result.stderr


def test_the_shipped_pair_is_saved_to_begin_with(trained: Trained, tmp_path: Path) -> None:
    models = tmp_path / "models"
    result = run_script("info", f"--output_dir={models}")
    assert (result.returncode, f"models: {models}" in result.stdout) == (0, True), result.stderr
    train = ("train_lung", *training_flags("lung", trained, tmp_path / "run", trained.cache, epochs=1))
    result = run_script(*train, f"--initial_checkpoint={models / 'lung'}")
    assert result.returncode == 2, result.stderr
    assert "which has filters (16, 32, 64, 128), not (4, 8, 16, 32);" in result.stderr
    result = run_script(*train, f"--initial_checkpoint={trained.lung}", "--learning_rate=1e-6")
    assert result.returncode == 0, result.stderr
    first, tuned = (load_model(folder) for folder in (trained.lung, tmp_path / "run"))
    assert tuned.config.initial_fingerprint == fingerprint(first.variables)
    kernels = [one.variables["params"]["output_conv"]["kernel"] for one in (first, tuned)]
    np.testing.assert_allclose(*kernels, atol=1e-4)
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("script", ["ablate", "cross_validate"])
def test_a_study_gets_the_models_to_begin_with(script: str, trained: Trained, tmp_path: Path) -> None:
    flags = (f"--data_dir={trained.data}", f"--workdir={tmp_path / 'study'}", f"--cache_dir={trained.cache}")
    splits = (
        [f"--split_files={trained.split_file}"] if script == "ablate" else ["--allow_missing", "--protocol=five_fold"]
    )
    result = run_script(script, *flags, *splits, f"--initial_lung_checkpoint={trained.infection}")
    assert (result.returncode, "expected a lung model" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_the_whole_way(phantom: Path, tmp_path: Path) -> None:
    """With paths below ~, flags of 0.6.0, scans in a window of their own, and terminals that lack most letters."""
    env = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    narrow = {**env, "PYTHONIOENCODING": "cp1252"}
    shutil.copytree(phantom, tmp_path / "data")
    store_in_window(tmp_path / "data" / "ct_scans", -1000, 400)
    assume = "--assume=window:-1000,400"
    result = run_script("train_lung", "--data_dir=~/data", "--cache_dir=~/cache", "--workdir=~/lung", env=env)
    assert (result.returncode, "--assume" in result.stderr) == (2, True)
    result = run_script("check_data", "--data_dir=~/data", assume, env=env)
    assert result.returncode == 0, result.stdout
    data = ("--data_dir=~/data", "--cache_dir=~/cache", assume)
    training = (*data, *TINY_FLAGS, "--split_seed=1", "--recipe=original", "--set=augment.quarter_turn=0.5")
    lung = ("train_lung", *training, "--workdir=~/lung", "--patch_factor=2", "--epochs=2")
    infection = ("train_infection", *training, "--workdir=~/infection", "--lung_checkpoint=~/lung", "--epochs=1")
    for command in (lung, infection):
        result = run_script(*command, env=env)
        assert result.returncode == 0, result.stderr
        assert "resuming" not in result.stderr
    assert len((tmp_path / "lung" / "metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((tmp_path / "lung" / "config.json").read_text())
    assert (config["augment"]["rot90_prob"], config["preprocess"]["normalization"]) == (0.5, "minmax")
    assert (config["augment"]["quarter_turn"], config["train"]["patch_factor"]) == (0.5, 2)  # keys of 0.6.0
    assert config["model"]["patch_grid"] == 2
    assert config["train"]["learning_rate"] == 3e-3  # a flag overrides the recipe
    checkpoints = ("--lung_checkpoint=~/lung", "--infection_checkpoint=~/infection", "--smallest_region=0.2")

    result = run_script("evaluate", *data, *checkpoints, "--split=test", "--output_dir=~/report", env=narrow)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["settings"]["smallest_region"] == 0.2
    test_cases = json.loads((tmp_path / "lung" / "split.json").read_text())["test"]
    assert [(row["case"], row["structure"]) for row in metrics["volumes"]] == [
        (case, structure) for case in test_cases for structure in ("lung", "left_lung", "right_lung", "infection")
    ]
    assert all(case in result.stdout for case in test_cases)

    predict_a_folder(tmp_path, [*checkpoints, assume], env)
    assert not (tmp_path / "~").exists()


def predict_a_folder(root: Path, flags: list[str], env: dict[str, str]) -> None:
    """Two scans and one that is none, and then what is missing."""
    scans, masks = root / "scans", root / "masks"
    scans.mkdir()
    first, second, *_ = sorted((root / "data" / "ct_scans").iterdir())
    shutil.copy(first, scans)
    shutil.copy(second, scans / "größer.nii")
    (scans / "bad.nii").write_bytes(b"not a scan")
    predict = ("predict", "--input=~/scans", "--output_dir=~/masks", *flags, "--compilation_cache_dir=~/compiled")
    keep_all = {**env, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result = run_script(*predict, env={**keep_all, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 2, result.stderr
    assert r"gr\xf6\xdfer_lung.nii.gz" in result.stdout
    assert "2 of 3 scans segmented" in result.stdout
    assert any((root / "compiled").iterdir())
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: {scans / 'bad.nii'}")
    kinds = ("lung.nii.gz", "infection.nii.gz", "report.json", "report.html", "preview.png")
    expected = [f"{name}_{kind}" for name in (first.stem, "größer") for kind in kinds]
    assert sorted(path.name for path in masks.iterdir() if not path.name.startswith(".")) == sorted(
        [*expected, "masks.json", "cohort.csv", "index.html"]
    )

    (masks / expected[0]).unlink()
    again = run_script(*predict, env={**env, "PYTHONIOENCODING": "cp1252"})
    assert again.returncode == 2
    assert again.stdout.count("(done before)") == 5
    assert "2 of 3 scans segmented, 1 of them before" in again.stdout
    assert (masks / expected[0]).is_file()


ENDED_BY_SIGTERM = """
import os, runpy, signal, sys
from resunet_jax.inference import batch
from resunet_jax.report import outputs

def segment_scans(scans, *args, **kwargs):
    yield batch.ScanResult(scans[0], [])
    os.kill(os.getpid(), signal.SIGTERM)

batch.segment_scans, outputs.write_cohort = segment_scans, lambda folder: ["the table"]
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_prediction_that_is_ended_leaves_its_table(phantom: Path, trained: Trained, tmp_path: Path) -> None:
    script = tmp_path / "ended.py"
    script.write_text(ENDED_BY_SIGTERM)
    models = (f"--lung_checkpoint={trained.lung}", f"--infection_checkpoint={trained.infection}")
    flags = (f"--input={phantom / 'ct_scans'}", f"--output_dir={tmp_path / 'out'}", *models)
    result = run_file(script, ROOT / "experiments" / "predict.py", *flags)
    assert (result.returncode, "the table" in result.stdout) == (143, True), result.stderr


def test_a_table_that_is_not_of_predictions_stays(phantom: Path, trained: Trained, tmp_path: Path) -> None:
    """Also beside a file that is named as a report is."""
    for name in ("cohort.csv", "x_report.json"):
        (tmp_path / name).write_text("{}")
    models = (f"--lung_checkpoint={trained.lung}", f"--infection_checkpoint={trained.infection}")
    result = run_script("predict", f"--input={phantom / 'ct_scans'}", f"--output_dir={tmp_path}", *models)
    assert result.returncode == 2
    assert "cohort.csv: would be replaced" in result.stderr
    assert "choose another --output_dir" in result.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"cohort.csv": "{}", "x_report.json": "{}"}


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    result = run_script("quickstart", "--small", "--epochs=1", f"--output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report" / "overlays.png").stat().st_size > 10_000
    assert f"evaluation: {tmp_path / 'run' / 'report'}" in result.stdout
    index = tmp_path / "run" / "masks" / "index.html"
    assert f"reports of the test scans: {index}" in result.stdout
    assert 'href="radiopaedia' in index.read_text(encoding="utf-8")
    assert "radiopaedia_14_85914_0" in result.stdout


def test_check_data(phantom: Path, tmp_path: Path) -> None:
    result = run_script("check_data", f"--data_dir={phantom}", env={"PYTHONIOENCODING": "ascii"})
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


def test_help_explains_every_flag_without_jax() -> None:
    assert set(FLAGS_OF) == {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"main"}
    commands = [("predict", "--input=a", "--output_dir=b"), *((script, "--help") for script in FLAGS_OF)]
    imports = "-jax,absl.app,resunet_jax.recipes,resunet_jax.data.readers"
    trapped, *helped = [
        run_forked(ROOT / "experiments" / f"{script}.py", *flags, env=os.environ, imports=imports)
        for script, *flags in commands
    ]
    assert "jax" in trapped.stderr  # the trap works
    for (script, names), result in zip(FLAGS_OF.items(), helped, strict=True):
        for name in names.split():
            assert re.search(rf"--(\[no\])?{name}:", result.stdout), (script, name)


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


def test_public_functions_take_paths_as_text(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in filter(inspect.isfunction, (getattr(resunet_jax, name) for name in resunet_jax.__all__)):
        for parameter in inspect.signature(function).parameters.values():
            assert not re.search(r"(?<!str \| )\bpathlib\.Path\b", str(parameter.annotation)), (function, parameter)
    scan = str(trained.data / "ct_scans" / "coronacases_org_001.nii")
    with open_scan(scan) as opened:
        shape = opened.grid.shape
    predictor = load_predictor(str(trained.lung))
    (result,) = segment_scans(find_sources(scan), str(tmp_path / "masks"), predictor)
    assert nib.load(result.masks[0]).shape == shape
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    lung = load_model(trained.lung)
    save_model("~/saved", lung.variables, lung.config)
    assert load_model("~/saved").config == lung.config
    workdir = shutil.copytree(trained.lung, tmp_path / "lung")
    split = SplitRequest(str(trained.split_file))
    history = train(Config(**TINY), str(trained.data), str(workdir), str(trained.cache), split=split)
    assert len(history) == TINY["train"].epochs
    evaluation = evaluate(
        str(trained.data),
        str(trained.cache),
        output_dir=str(tmp_path / "report"),
        lung_checkpoint=str(workdir),
        split_file=str(trained.split_file),
    )
    assert {row["case"] for row in evaluation.volumes} == {"coronacases_003", "radiopaedia_14_85914_0"}


README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_readme_code_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_readme_has_code() -> None:
    assert README_BLOCKS


def copy_phantom(root: Path, trained: Trained) -> Path:
    shutil.copytree(trained.data, root / "data")
    return root / "data"


def change_mask(data: Path, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
    path = data / "lung_mask" / "coronacases_001.nii"
    image = nib.load(path)
    nib.save(change(nib.Nifti1Image(np.asarray(image.dataobj).copy(), image.affine)), path)


# What no flag decides is checked by the library, without a process for each; messages name `arguments`.


def bad_no_data_folder(root: Path, trained: Trained) -> tuple[Path, str]:
    return root / "none", "no such folder.*`data_dir`"


def bad_empty_folder(root: Path, trained: Trained) -> tuple[Path, str]:
    return root, "neither metadata.csv nor a folder"


def bad_csv_columns(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    (data / "metadata.csv").write_text("ct_scan,mask\na,b\n")
    return data, r"metadata\.csv: no column lung_mask"


def bad_missing_mask(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    (data / "lung_mask" / "coronacases_002.nii").unlink()
    return data, r"coronacases_002\.nii: no such file"


def bad_missing_infection_mask(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    (data / "metadata.csv").unlink()
    (data / "infection_mask" / "coronacases_002.nii").unlink()
    return data, "coronacases_002: no infection mask"


def bad_double_mask(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    (data / "metadata.csv").unlink()
    shutil.copy(data / "lung_mask" / "coronacases_001.nii", data / "lung_mask" / "coronacases_org_001.nii")
    return data, "both match case coronacases_001"


def bad_mask_shape(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    change_mask(data, lambda image: image.slicer[:, :, :-1])
    return data, r"coronacases_001\.nii: shape"


def bad_mask_affine(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    change_mask(data, lambda image: nib.Nifti1Image(image.dataobj, image.affine @ np.diag([1, 1, 1.1, 1])))
    return data, r"coronacases_001\.nii: its affine differs"


def bad_truncated(root: Path, trained: Trained) -> tuple[Path, str]:
    data = copy_phantom(root, trained)
    path = data / "ct_scans" / "coronacases_org_001.nii"
    path.write_bytes(path.read_bytes()[:-1000])
    return data, r"coronacases_org_001\.nii.*cut off"


@pytest.mark.parametrize(
    "spoil",
    [
        bad_no_data_folder,
        bad_empty_folder,
        bad_csv_columns,
        bad_missing_mask,
        bad_missing_infection_mask,
        bad_double_mask,
        bad_mask_shape,
        bad_mask_affine,
        bad_truncated,
    ],
)
def test_bad_data_is_named_and_leaves_no_workdir(trained: Trained, tmp_path: Path, spoil) -> None:
    data, message = spoil(tmp_path, trained)
    task = "infection_ct" if spoil is bad_missing_infection_mask else "lung"
    split = SplitRequest(trained.split_file)
    with pytest.raises(InputError, match=message):
        train(Config(task=task, **TINY), data, tmp_path / "run", tmp_path / "cache", split=split)
    found = {path.name for path in (tmp_path / "run").glob("*")}
    assert found <= {".lock"}  # bad voxels are met under the lock


def test_too_few_patients_are_named(trained: Trained, tmp_path: Path) -> None:
    data = copy_phantom(tmp_path, trained)
    lines = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(InputError, match=r"2 patient\(s\) are too few"):
        train(Config(**TINY), data, tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lung_checkpoint", "message"),
    [
        ("none", "none: no such checkpoint folder"),
        ("infection", "a lung model, this one segments infection"),
        (None, "infection training needs the lung model: give its workdir with `lung_checkpoint`"),
    ],
)
def test_bad_lung_models_are_named(trained: Trained, tmp_path: Path, lung_checkpoint, message: str) -> None:
    config = Config(task="infection", **TINY)
    lung = trained.lung.with_name(lung_checkpoint) if lung_checkpoint else None
    with pytest.raises(InputError, match=message):
        train(config, trained.data, tmp_path / "run", tmp_path / "cache", lung_checkpoint=lung)
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_architecture_is_named(trained: Trained, tmp_path: Path) -> None:
    lung = load_model(trained.lung)
    save_model(tmp_path / "model", lung.variables, lung.config)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model"]["filters"] = [8, 16, 32, 64]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "files.json").unlink()
    with pytest.raises(InputError, match="another architecture"):
        load_predictor(tmp_path / "model", None)


# What flags decide, in processes.


class Bad(NamedTuple):
    script: str
    flags: list[str]
    message: str


def training(root: Path, data: Path, *flags: str) -> list[str]:
    common = [f"--data_dir={data}", f"--workdir={root / 'run'}", f"--cache_dir={root / 'cache'}"]
    return [*common, *TINY_FLAGS, "--epochs=1", *flags]


def bad_flags(root: Path, trained: Trained) -> list[Bad]:
    (root / "file").touch()
    (root / "small").mkdir()
    write_split(root / "small" / "split.json", Split(("a",), (), ("b",)))
    shutil.copytree(trained.data / "ct_scans", root / "scans")
    lung, data = f"--lung_checkpoint={trained.lung}", trained.data
    evaluation = [f"--data_dir={data}", f"--cache_dir={trained.cache}", lung]
    return [
        Bad("train_lung", training(root, root / "none"), "no such folder.*--data_dir"),
        Bad(
            "train_lung", training(root, data, "--image_size=100"), "image_size is 100; it must be a positive multiple"
        ),
        Bad("train_lung", training(root, data, "--filters=64,many"), "--filters=64,many"),
        Bad("train_lung", training(root, data, "--set=max_zoom"), "--set=max_zoom: it must be a field and its value"),
        Bad("train_infection", training(root, data), "--lung_checkpoint, or --ct_only"),
        Bad(
            "train_infection",
            training(root, data, lung, "--normalization=minmax", *UNCHANGED_LESIONS),
            "the same --recipe, --image_size and --normalization",
        ),
        Bad("ablate", training(root, data)[:3], "give either --protocol or --split_files"),
        Bad("ablate", [*training(root, data), "--set=train.seed=7"], "given by --seeds"),
        Bad("cross_validate", training(root, data, "--set=train.seed=[1]"), "train.seed"),
        Bad("train_lung", training(root, data, "--set=train.epochs=7"), "another flag says that train.epochs is 1"),
        Bad("calibrate", [*evaluation, f"--output_dir={root / 'run'}", "--seed=3"], "give --study_dir too"),
        Bad(
            "convert_torch",
            [f"--input={trained.lung}", f"--output_file={root / 'run' / 'x.pt'}", "--task=infection"],
            "expected a infection model, this one segments lung",
        ),
        Bad("evaluate", [*evaluation, f"--output_dir={root / 'file' / 'out'}"], "out: cannot be written"),
        Bad(
            "evaluate",
            [*evaluation, f"--output_dir={root / 'run'}", "--infection_threshold=0.1"],
            "there is no infection; give --infection_checkpoint, or leave it out",
        ),
        Bad("export", [f"--output={root / 'run'}", "--infection_threshold=1"], "it must lie between 0 and 1"),
        Bad(
            "evaluate",
            [*evaluation, f"--output_dir={root / 'run'}", "--split=all", f"--split_file={root / 'none'}"],
            "--split_file: its subsets are not asked for by --split=all",
        ),
        Bad("evaluate", [*evaluation, f"--output_dir={root / 'run'}", "--lung_tolerance_mm=inf"], "a finite number"),
        Bad(
            "evaluate",
            [*evaluation, f"--output_dir={root / 'run'}", "--infection_tolerance_mm=7"],
            "--infection_tolerance_mm: give --infection_checkpoint too",
        ),
        Bad(
            "convert_torch",
            [f"--input={trained.lung}", f"--output_file={root / 'run' / 'x.pt'}", "--image_size=64"],
            "--image_size is of a model from PyTorch",
        ),
        Bad(
            "predict",
            [f"--input={root / 'scans'}", f"--output_dir={root / 'run'}", lung, "--consolidation_hu=-100"],
            "--consolidation_hu is of the report",
        ),
        Bad("benchmark", ["--suite=startup", "--json="], "--json is empty; give a path"),
        Bad("evaluate", [f"--data_dir={data}", f"--output_dir={root / 'run'}"], "Give --split_file, or --split=all"),
        Bad(
            "evaluate",
            [*evaluation, f"--output_dir={root / 'run'}", "--assume=window:1"],
            "--assume=window:1: it must be hu, or window:LOW,HIGH",
        ),
        Bad("predict", [f"--input={root / 'scans'}", f"--output_dir={root / 'scans'}", lung], "is the input folder"),
        Bad(
            "predict",
            [f"--input={root / 'scans'}", f"--output_dir={root / 'run'}", "--lobes=x"],
            "--lobes=x is of one scan",
        ),
        Bad("predict", ["--input=", f"--output_dir={root / 'run'}"], "--input is empty; give a path"),
        Bad(
            "predict",
            [f"--input={root / 'scans'}", f"--output_dir={root / 'run'}", "--assume=no"],
            "--assume=no: it must",
        ),
        Bad("evaluate", [*evaluation, f"--output_dir={root / 'run'}", "--split_file="], "--split_file is empty"),
        Bad("make_phantom", ["--small", f"--output_dir={root}"], "exists already"),
        Bad("predict", ["--multilabel"], "missing: --input, --output_dir; see --help"),
        Bad("check_data", [f"--data_dri={root}"], "Unknown command line flag 'data_dri'.*; see --help"),
        Bad("train_lung", training(root, data, "--batch_size=0"), "batch_size is 0; it must be at least 1"),
        Bad("quickstart", [f"--output_dir={root / 'small'}"], "holds a run with --small; choose another folder"),
        Bad(
            "predict",
            [f"--input={root / 'scans'}", f"--output_dir={root / 'run'}", lung, "--report"],
            "give both models",
        ),
        Bad("ablate", [*training(root, data), f"--split_files={root / 'none'}"], "check --split_files"),
        Bad(
            "ablate",
            [*training(root, data), f"--split_files={trained.split_file}", "--allow_missing"],
            "--split_files decides alone; drop .*--allow_missing",
        ),
        Bad(
            "calibrate",
            [f"--data_dir={data}", f"--output_dir={root / 'run'}"],
            "which cases have the models not seen. Give --split_file",
        ),
        Bad("check_data", [f"--data_dir={root / 'none'}"], "no such folder"),
        Bad("check_data", [f"--data_dir={data}", "more"], "unexpected argument more"),
    ]


UNCHANGED_LESIONS = ("--set=augment.lesion_densify_prob=0", "--set=augment.lesion_fade_prob=0")


def test_bad_flags_give_one_clear_line(trained: Trained, tmp_path: Path) -> None:
    bad_inputs = bad_flags(tmp_path, trained)
    for bad in bad_inputs:
        result = run_script(bad.script, *bad.flags)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode == 2, (bad, result.stderr)
        assert "Traceback" not in result.stderr
        assert len(errors) == 1, result.stderr
        assert re.search(bad.message, errors[0]), (bad, errors[0])
    assert not (tmp_path / "run").exists()


def test_a_scan_that_is_refused_is_told_with_the_flag_that_helps(trained: Trained, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(3000, 3766, (48, 48, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([4.0, 4.0, 8.0, 1.0])), tmp_path / "scan.nii")
    flags = (f"--input={tmp_path / 'scan.nii'}", f"--output_dir={tmp_path / 'out'}")
    result = run_script("predict", *flags, f"--lung_checkpoint={trained.lung}")
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (result.returncode, "--assume" in error, "`" in error) == (2, True, False), error


@pytest.mark.parametrize("flags", [[], ["--threshold=0.5"]])
def test_the_infection_may_have_a_threshold_of_its_own(trained: Trained, tmp_path: Path, flags: list[str]) -> None:
    models = (f"--lung_checkpoint={trained.lung}", f"--infection_checkpoint={trained.infection}")
    scan = min((trained.data / "ct_scans").iterdir())
    written = (f"--input={scan}", f"--output_dir={tmp_path}", "--noreport", "--infection_threshold=0.05")
    result = run_script("predict", *written, *models, *flags)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "masks.json").read_text(encoding="utf-8"))
    assert record["settings"]["thresholds"] == {"lung": 0.5, "infection": 0.05}


def test_bad_scans_are_named_one_by_one(trained: Trained, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    values = np.random.default_rng(0).integers(-1000, 200, (16, 16, 4)).astype(np.float32)
    with_nan = values.copy()
    with_nan[3, 3, 1] = np.nan
    rgb = np.zeros((16, 16, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    arrays = {"nan": with_nan, "constant": np.zeros_like(values), "four_d": np.stack([values] * 2, -1), "rgb": rgb}
    for name, array in arrays.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), scans / f"{name}.nii")
    (scans / "text.nii.gz").write_bytes(b"not a scan")
    result = run_script(
        "predict", f"--input={scans}", f"--output_dir={tmp_path / 'out'}", f"--lung_checkpoint={trained.lung}"
    )
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
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".locks"]


def test_nobody_reads_what_is_printed() -> None:
    command = [sys.executable, ROOT / "experiments" / "info.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
