"""What compiled programs hold: no variables, which would make each training leave them in the compilation cache."""

import os
import re
from math import prod
from pathlib import Path

import pytest

from tests.conftest import Trained, run_script, training_flags

LARGEST = 100  # values of a constant: tables of angles and convolution transforms; the smallest kernel has 144


def constants(folder: Path) -> dict[str, int]:
    """By program, the number of values of its largest constant, before and after the compiler has folded them."""
    largest = {}
    for file in folder.glob("*_optimizations.txt"):
        shapes = re.findall(r"= \w+\[([\d,]+)\]\S* constant\(", file.read_text())
        largest[file.name] = max((prod(map(int, shape.split(","))) for shape in shapes), default=0)
    return largest


@pytest.mark.parametrize("command", ["train_infection", "predict"])
def test_variables_are_arguments_of_compiled_programs(trained: Trained, tmp_path: Path, command: str) -> None:
    models = [f"--lung_checkpoint={trained.lung}", f"--infection_checkpoint={trained.infection}"]
    flags = {
        "train_infection": training_flags("infection", trained, tmp_path / "run", trained.cache, 1),
        "predict": [*models, f"--input={trained.data / 'ct_scans'}", f"--output_dir={tmp_path / 'masks'}"],
    }[command]
    dump = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={tmp_path / 'dump'} --xla_dump_hlo_as_text"
    result = run_script(command, *flags, "--compilation_cache_dir=", env={"XLA_FLAGS": dump})
    assert result.returncode == 0, result.stderr
    found = constants(tmp_path / "dump")
    assert any("jit_step" in name or "jit_probability" in name for name in found)
    assert {name: size for name, size in found.items() if size > LARGEST} == {}
