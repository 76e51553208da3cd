"""The examples in docstrings, run."""

import doctest
import importlib

import jax
import pytest

MODULES = {
    "resunet_jax.metrics.calibration": 1,
    "resunet_jax.metrics.conformal": 3,
    "resunet_jax.model.cascade": 3,
    "resunet_jax.model.resunet": 1,
    "resunet_jax.training.losses": 3,
    "resunet_jax.weights.export": 2,
}
"""Modules, and how many of their docstrings have examples."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert len(found) == MODULES[name]
    with jax.numpy_rank_promotion("allow"):  # as users have it
        assert doctest.testmod(module).failed == 0
