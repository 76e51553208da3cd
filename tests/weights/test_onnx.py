"""The ONNX file, made and run in an environment of its own, as the head of the script says."""

import ast
import os
import subprocess
import venv
from pathlib import Path

import jax
import numpy as np
import pytest

from resunet_jax.data.phantom import draw_scan
from resunet_jax.data.preprocess import prepare_volume
from resunet_jax.data.volume import scan_from_array
from resunet_jax.inference.predictor import load_pretrained
from resunet_jax.weights.export import cascade_program
from resunet_jax.weights.pretrained import load_pair
from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "experiments" / "export_onnx.py"
RUN = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
results = {}
for count in (1, 3, 8):
    for name, found in zip(("lung", "infection", "geometric_mean"), session.run(None, {"images": images[:count]})):
        results[f"{name}_{count}"] = found
np.savez(sys.argv[3], **results)
"""


def test_without_its_converter_the_script_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["jax2onnx"] = None\n')
    result = run_script(
        "export_onnx", f"--output={tmp_path / 'a'}", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: jax2onnx cannot be imported")
    assert len(result.stderr.splitlines()) == 1


def packages() -> list[str]:
    """What the head of the script installs."""
    head = ast.get_docstring(ast.parse(SCRIPT.read_text(encoding="utf-8"))) or ""
    (line,) = [line for line in head.splitlines() if "pip install jax2onnx" in line]
    return line.split("install ")[1].split()


@pytest.mark.exhaustive
def test_onnxruntime_equals_jax(tmp_path: Path) -> None:
    venv.create(tmp_path / "onnx", with_pip=True)
    python = tmp_path / "onnx" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "PYTHONPATH": str(ROOT)}  # in place of `pip install --no-deps .`
        return subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, check=False, env=env)

    installed = run("-m", "pip", "install", "--quiet", *packages())
    if installed.returncode:
        pytest.skip(f"packages cannot be had: {installed.stderr.strip().splitlines()[-1]}")
    made = run(SCRIPT, f"--output={tmp_path / 'cascade.onnx'}")
    assert made.returncode == 0, made.stderr
    assert len(made.stderr.splitlines()) <= 1, made.stderr
    assert str(ROOT).encode() not in (tmp_path / "cascade.onnx").read_bytes()
    assert (tmp_path / "cascade.onnx.json").is_file()
    rng = np.random.default_rng(0)
    values = draw_scan(rng, rng, (128, 128, 16), np.array([2.8, 2.8, 16.0]), nearly_free=False)[0]
    scan = scan_from_array(values, np.diag([2.8, 2.8, 16.0, 1.0]))
    images, _ = prepare_volume(scan.read_slices(0, 16), load_pretrained().preprocess)
    images = images[4:12]
    images[0] = 0  # a slice without lung
    np.save(tmp_path / "images.npy", images)
    ran = run("-c", RUN, tmp_path / "cascade.onnx", tmp_path / "images.npy", tmp_path / "found.npz")
    assert ran.returncode == 0, ran.stderr
    expected = jax.jit(cascade_program(*load_pair(), thresholds={"lung": 0.5, "infection": 0.5}))(images)
    assert all(float(one.max()) > 0.5 for one in expected)
    # Rounding of a probability near 0 by 1e-7, which sigmoids may do, is 3e-4 in the root of its product with 1.
    tolerances = {"lung": 1e-5, "infection": 1e-5, "geometric_mean": 3e-4}
    with np.load(tmp_path / "found.npz") as found:
        for count in (1, 3, 8):
            for (name, atol), one in zip(tolerances.items(), expected, strict=True):
                np.testing.assert_allclose(found[f"{name}_{count}"], one[:count], rtol=0, atol=atol)
