import pytest
from benchmarks.measure import in_subprocess, interleave, print_rows, row, timed

from resunet_jax.errors import InputError


def test_sides_are_interleaved_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    jax_seconds, baseline_seconds = interleave(lambda: calls.append("a"), lambda: calls.append("b"), 2)
    assert calls == ["a", "a", "b", "b"] * 3  # each settles, then is timed
    assert (len(jax_seconds), len(baseline_seconds)) == (2, 2)
    calls.clear()
    assert interleave(lambda: calls.append("a"), None, 3, settle=False)[1] == []
    assert calls == ["a"] * 4


def test_figures_are_medians_and_ratios_with_their_targets() -> None:
    figure = row("train", "step", "s", [1.0, 9.0, 2.0], [4.0, 4.0, 5.0], max_ratio=0.5)
    assert (figure.jax, figure.baseline, figure.ratio, figure.passed) == (2.0, 4.0, 0.5, True)
    assert figure.target == "ratio ≤ 0.5"
    assert figure.spread == (1.0, 9.0, 4.0, 5.0)
    written = figure.to_dict()
    assert (written["ours"], written["rival"], written["met"]) == (2.0, 4.0, True)  # keys of 0.6.0
    assert (written["jax"], written["baseline"], written["passed"]) == (2.0, 4.0, True)
    assert row("data", "x", "/s", [10.0], [1.0], min_value=11, min_ratio=5).passed is False
    assert row("data", "x", "/s", [10.0], [1.0], min_value=10, min_ratio=5).passed is True
    assert row("memory", "x", "GB", [2.1], max_value=2).passed is False
    assert row("memory", "x", "GB", [2.1]).passed is None
    # Where the baseline is missing, a target for the ratio is not reached.
    assert row("train", "x", "s", [2.1], max_ratio=1).passed is False


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([row("train", "step", "s", [2.0], [4.0], max_ratio=0.4), row("memory", "peak", "GB", [1.5])])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[-2] == ["train", "step", "s", "2", "(2–2)", "4", "(4–4)", "0.50", "ratio", "≤", "0.4", "NO"]
    assert lines[-1] == ["memory", "peak", "GB", "1.5", "(1.5–1.5)", "–", "–"]


def test_a_process_of_its_own() -> None:
    code = "import time, benchmarks; time.sleep(0.2); x = b'x' * 200_000_000; print('done')"
    output, seconds, peak = in_subprocess(code)
    assert output == "done"
    assert seconds > 0.2
    assert 0.2 < peak < 0.4
    with pytest.raises(InputError, match="ValueError: no"):
        in_subprocess("raise ValueError('no')")


def test_timed_waits_for_the_run() -> None:
    assert timed(lambda: sum(range(100_000))) > 0
