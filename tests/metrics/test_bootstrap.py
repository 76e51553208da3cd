import math

import numpy as np
import pytest

from resunet_jax.metrics.bootstrap import bootstrap_interval, seed_patient_interval, summary_statistics


def test_closed_form() -> None:
    values = summary_statistics([0.5, 1.0, 0.9, math.nan], ["a", "b", "c", "d"])
    assert values["mean"] == pytest.approx(0.8)
    assert values["sd"] == pytest.approx(np.std([0.5, 1.0, 0.9], ddof=1))
    assert values["median"] == 0.9
    assert (values["volumes"], values["undefined"]) == (4, 1)
    assert 0.5 <= values["ci_low"] < 0.8 < values["ci_high"] <= 1


def test_two_scans_of_a_patient_are_not_two_patients() -> None:
    """Doubling every scan of every patient must not narrow the interval, as drawing volumes would."""
    values, patients = [0.2, 0.4, 0.6, 0.8, 0.9], list("abcde")
    once, twice = bootstrap_interval(values, patients), bootstrap_interval(values * 2, patients * 2)
    assert once == pytest.approx(twice)
    as_if_independent = bootstrap_interval(values * 2, [*patients, *"fghij"])
    assert as_if_independent[1] - as_if_independent[0] < 0.8 * (twice[1] - twice[0])


def test_scans_of_a_patient_are_drawn_together() -> None:
    """Of two patients, one is drawn twice in a quarter of the samples; four ones in four volumes are drawn in 0.4 %."""
    assert bootstrap_interval([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]) == (0, 1)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(size=30)
        low, high = bootstrap_interval(values, [str(i) for i in range(30)])
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_order_does_not_matter() -> None:
    values, patients = [0.1, 0.5, 0.9, 0.3], ["a", "b", "c", "a"]
    assert bootstrap_interval(values, patients) == bootstrap_interval(values, patients)
    assert bootstrap_interval(values[::-1], patients[::-1]) == pytest.approx(bootstrap_interval(values, patients))


@pytest.mark.parametrize("patients", [[], ["a"], ["a", "a"]])
def test_too_few_patients_have_no_interval(patients: list[str]) -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([0.5] * len(patients), patients))


def test_interval_over_seeds_and_patients() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in range(30)]
    volumes = rng.normal(0.5, 0.1, 30)
    alone = bootstrap_interval(volumes, patients)
    # Seeds that agree add nothing; seeds that do not make the interval wider.
    assert seed_patient_interval(np.stack([volumes] * 3), patients) == pytest.approx(alone, abs=0.005)
    low, high = seed_patient_interval(np.stack([volumes - 0.1, volumes, volumes + 0.1]), patients)
    assert low < alone[0] - 0.03
    assert high > alone[1] + 0.03


def test_interval_of_one_patient_is_over_seeds_and_of_one_seed_over_patients() -> None:
    assert seed_patient_interval(np.array([[0.2], [0.4]]), ["a"]) == pytest.approx((0.2, 0.4))
    assert seed_patient_interval(np.array([[0.2, 0.4]]), ["a", "b"]) == pytest.approx((0.2, 0.4))
    assert all(math.isnan(bound) for bound in seed_patient_interval(np.array([[0.2]]), ["a"]))
