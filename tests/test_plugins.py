"""A package that adds a row to every table, used by the scripts in processes of their own."""

import csv
import json
import os
import re
import subprocess
import textwrap
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax import plugins
from resunet_jax.errors import InputError
from resunet_jax.metrics import METRICS
from resunet_jax.plugins import Tables, load_plugins
from resunet_jax.training.losses import LOSSES
from tests.conftest import TINY_FLAGS, run_script

PLUGIN = """
    import contextlib
    import numpy as np
    from resunet_jax.data.readers import Reader
    from resunet_jax.data.readers.source import by_suffix, file_digest
    from resunet_jax.data.volume import scan_from_array
    from resunet_jax.metrics import Metric
    from resunet_jax.model.build import ARCHITECTURES
    from resunet_jax.training.losses import bce, mean_over_examples

    @contextlib.contextmanager
    def open_npy(source):
        yield scan_from_array(np.load(source.path), np.diag([2.0, 2.0, 8.0, 1.0]))

    ROWS = {
        "losses": {"toy": mean_over_examples(lambda logits, mask: 3 * bce(logits, mask))},
        "augmentations": {"toy_negative": lambda key, image, mask, config: (1 - image, mask)},
        "metrics": {"toy_litres": Metric(lambda c: c.volumes_ml[0] / 1000, "predicted", "l")},
        "architectures": {"toy_net": lambda config, convolution: ARCHITECTURES["resunet"](config, convolution)},
        "readers": {"npy": Reader(by_suffix((".npy",)), open_npy, file_digest)},
    }
"""


def install(folder: Path, code: str = PLUGIN) -> dict[str, str]:
    """Makes a folder of installed packages with one plugin; returns the environment that has it."""
    information = folder / "toy_plugin-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "toy_plugin.py").write_text(textwrap.dedent(code), encoding="utf-8")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text(f"[{plugins.GROUP}]\ntoy = toy_plugin:ROWS\n", encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def write_npy_set(phantom: Path, folder: Path) -> Path:
    """Four scans of the phantom and their masks as .npy, with metadata.csv."""
    with (phantom / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = [{name: Path(value).name for name, value in row.items()} for row in csv.DictReader(file)]
    rows = [row for i, row in enumerate(rows) if i in (0, 1, 3, 5)]
    columns = {"ct_scan": "ct_scans", "lung_mask": "lung_mask", "infection_mask": "infection_mask"}
    written = []
    for row in rows:
        names = {column: f"{part}/{row[column].removesuffix('.nii')}.npy" for column, part in columns.items()}
        for column, name in names.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = nib.as_closest_canonical(nib.load(phantom / columns[column] / row[column]))
            np.save(path, np.asarray(image.dataobj))
        written.append(names)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(written)
    return folder


@pytest.mark.slow
def test_a_plugin_trains_evaluates_and_predicts(phantom: Path, tmp_path: Path) -> None:
    installed = install(tmp_path / "site")
    data = write_npy_set(phantom, tmp_path / "data")
    lung, report, masks = (tmp_path / name for name in ("lung", "report", "masks"))
    cases = ["coronacases_001", "coronacases_002", "radiopaedia_10_85902_1", "radiopaedia_14_85914_0"]
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": cases[:2], "val": cases[2:3], "test": cases[3:]}), encoding="utf-8")
    common = (f"--data_dir={data}", f"--cache_dir={tmp_path / 'cache'}")
    plain = (*common, f"--workdir={tmp_path / 'without'}", f"--split_file={split}", *TINY_FLAGS, "--epochs=1")
    transforms = '--set=augment.transforms=["spatial", "toy_negative"]'
    scan = next((data / "ct_scans").glob("*14_85914*"))
    own = ("--loss=toy:1", transforms, "--architecture=toy_net")
    train = ("train_lung", *plain, *own, f"--workdir={lung}")
    evaluate = ("evaluate", *common, f"--lung_checkpoint={lung}", f"--output_dir={report}")
    predict = ("predict", f"--input={scan}", f"--lung_checkpoint={lung}", f"--output_dir={masks}")

    for command in (train, evaluate, predict):
        result = run_script(*command, env=installed)
        assert result.returncode == 0, result.stderr

    (row,) = json.loads((report / "metrics.json").read_text(encoding="utf-8"))["volumes"][:1]
    assert row["case"] == cases[3]
    assert row["toy_litres"] == row["volume_ml"] / 1000
    assert "toy_litres" in (report / "volumes.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    mask = nib.load(masks / f"{scan.stem}_lung.nii.gz")
    assert mask.shape == np.load(scan).shape
    np.testing.assert_array_equal(mask.affine, np.diag([2, 2, 8, 1]))
    assert np.count_nonzero(mask.dataobj) == row["tp"] + row["fp"]

    without = {
        ("train_lung", *plain, "--loss=toy:1"): "'toy' is not one of bce",
        ("train_lung", *plain, transforms): "augmentation 'toy_negative'.*install the plugin",
        ("train_lung", *plain, "--architecture=toy_net"): "architecture 'toy_net'.*install the plugin",
        ("train_lung", *plain): r"\.npy: not a scan; formats that are read: nifti",
        evaluate: "architecture 'toy_net'.*install the plugin",
        predict: r"\.npy: not a scan; formats that are read: nifti",
    }
    for command, message in without.items():
        assert_one_line(run_script(*command), message)
    assert not (tmp_path / "without").exists()


def assert_one_line(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert re.search(message, line), line


def entry_points(monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Lets each name be a plugin whose object is what the text says."""
    entries = [EntryPoint(name, value, plugins.GROUP) for name, value in modules.items()]
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: entries)


ROWS: Mapping[str, object] = {"losses": {"mine": LOSSES["bce"]}, "metrics": {"mine": METRICS["dice"]}}
UNKNOWN_TABLE: Mapping[str, object] = {"loss": {"mine": LOSSES["bce"]}}
TAKEN: Mapping[str, object] = {"losses": {"bce": LOSSES["dice"]}}
NO_LOSS: Mapping[str, object] = {"losses": {"mine": len}}
NO_FUNCTION: Mapping[str, object] = {"augmentations": {"mine": "flip"}}
NO_TABLES = 3


def test_rows_of_plugins_are_added_to_copies_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, one=f"{__name__}:ROWS")
    tables = load_plugins()
    assert list(tables.losses) == [*LOSSES, "mine"]
    assert list(tables.metrics) == [*METRICS, "mine"]
    assert tables.readers == Tables().readers
    assert "mine" not in LOSSES
    assert set(tables.for_training) == {"losses", "augmentations", "architectures", "readers"}
    assert set(tables.for_evaluation) == {"metrics", "architectures", "readers"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("UNKNOWN_TABLE", "there is no table 'loss'; there are losses, augmentations, architectures, metrics, readers"),
        ("TAKEN", "'bce' is in the table losses already"),
        ("NO_LOSS", "'mine' in the table losses is <built-in function len>; it must be a Loss"),
        ("NO_FUNCTION", "'mine' in the table augmentations is 'flip'; it must be a function"),
        ("NO_TABLES", "cannot be loaded"),
        ("ABSENT", "cannot be loaded .*ABSENT"),
    ],
)
def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    entry_points(monkeypatch, toy=f"{__name__}:{value}")
    with pytest.raises(InputError, match=f"plugin toy .*{message}"):
        load_plugins()


def test_two_plugins_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, one=f"{__name__}:ROWS", two=f"{__name__}:ROWS")
    with pytest.raises(InputError, match=r"plugin two .*'mine' is in the table losses already"):
        load_plugins()


def test_a_plugin_that_cannot_be_imported_ends_a_script_with_one_line(tmp_path: Path) -> None:
    env = install(tmp_path, "raise RuntimeError('first line\\nsecond line')")
    result = run_script("check_data", f"--data_dir={tmp_path}", env=env)
    assert_one_line(result, r"plugin toy \(toy_plugin:ROWS\): cannot be loaded \(first line\); fix or uninstall it")
