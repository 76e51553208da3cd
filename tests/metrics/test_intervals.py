import math

import numpy as np
import pytest
from scipy import stats

from resunet_jax.metrics.intervals import patient_interval, summary_statistics


def test_closed_form() -> None:
    values = summary_statistics([0.5, 1.0, 0.9, math.nan], ["a", "b", "c", "d"])
    assert values["mean"] == pytest.approx(0.8)
    assert values["sd"] == pytest.approx(np.std([0.5, 1.0, 0.9], ddof=1))
    assert values["median"] == 0.9
    assert (values["volumes"], values["undefined"]) == (4, 1)
    expected = stats.t.interval(0.95, 2, loc=0.8, scale=stats.sem([0.5, 1.0, 0.9]))
    assert (values["ci_low"], values["ci_high"]) == pytest.approx(expected)


def test_two_scans_of_a_patient_are_not_two_patients() -> None:
    """Doubling every scan of every patient must not narrow the interval, as counting volumes would."""
    values, patients = [0.2, 0.4, 0.6, 0.8, 0.9], list("abcde")
    once, twice = patient_interval(values, patients), patient_interval(values * 2, patients * 2)
    assert once == pytest.approx(twice)
    as_volumes = patient_interval(values * 2, [*patients, *"fghij"])
    assert as_volumes[1] - as_volumes[0] < 0.8 * (twice[1] - twice[0])


def test_patients_with_more_volumes_weigh_more_as_they_do_in_the_mean() -> None:
    low, high = patient_interval([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert (low + high) / 2 == pytest.approx(0.25)


def coverage(draw, patients: int, runs: int = 4000) -> float:
    rng = np.random.default_rng(0)
    mean = draw(rng, 2_000_000).mean()
    names = [str(i) for i in range(patients)]
    intervals = np.array([patient_interval(draw(rng, patients), names) for _ in range(runs)])
    return float(((intervals[:, 0] <= mean) & (mean <= intervals[:, 1])).mean())


@pytest.mark.parametrize("patients", [2, 3, 5, 10])
def test_interval_covers_the_mean_as_often_as_it_says(patients: int) -> None:
    """The figures of the module's docstring; a percentile bootstrap has 0.50, 0.75 and 0.86 at 2, 3 and 5 patients."""
    assert 0.94 <= coverage(lambda rng, n: rng.normal(0.6, 0.1, n), patients) <= 0.96
    assert 0.92 <= coverage(lambda rng, n: rng.beta(8, 2, n), patients) <= 0.96


def test_interval_falls_short_where_one_patient_in_five_fails() -> None:
    def draw(rng: np.random.Generator, n: int):
        return np.where(rng.random(n) < 0.2, rng.beta(1, 10, n), rng.beta(14, 6, n))

    assert 0.80 <= coverage(draw, 5) <= 0.85


def test_order_does_not_matter() -> None:
    values, patients = [0.1, 0.5, 0.9, 0.3], ["a", "b", "c", "a"]
    assert patient_interval(values[::-1], patients[::-1]) == pytest.approx(patient_interval(values, patients))


@pytest.mark.parametrize("patients", [[], ["a"], ["a", "a"]])
def test_too_few_patients_have_no_interval(patients: list[str]) -> None:
    assert all(math.isnan(end) for end in patient_interval([0.5] * len(patients), patients))
