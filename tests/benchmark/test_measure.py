from pathlib import Path

import pytest

from resunet_jax.benchmark.measure import alternate, in_subprocess, print_rows, row, timed
from resunet_jax.errors import InputError


def test_sides_take_turns_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    ours, rival = alternate(lambda: calls.append("a"), lambda: calls.append("b"), 2)
    assert calls == ["a", "a", "b", "b"] * 3  # each settles, then is timed
    assert (len(ours), len(rival)) == (2, 2)
    calls.clear()
    assert alternate(lambda: calls.append("a"), None, 3, settle=False)[1] == []
    assert calls == ["a"] * 4


def test_figures_are_medians_and_ratios_beside_their_targets() -> None:
    figure = row("train", "step", "s", [1.0, 9.0, 2.0], [4.0, 4.0, 5.0], ratio_most=0.5)
    assert (figure.ours, figure.rival, figure.ratio, figure.met) == (2.0, 4.0, 0.5, True)
    assert figure.target == "ratio ≤ 0.5"
    assert figure.spread == (1.0, 9.0, 4.0, 5.0)
    assert row("data", "x", "/s", [10.0], [1.0], least=11, ratio_least=5).met is False
    assert row("data", "x", "/s", [10.0], [1.0], least=10, ratio_least=5).met is True
    assert row("memory", "x", "GB", [2.1], most=2).met is False
    assert row("memory", "x", "GB", [2.1]).met is None
    # Where the rival is missing, a target for the ratio is not met.
    assert row("train", "x", "s", [2.1], ratio_most=1).met is False


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([row("train", "step", "s", [2.0], [4.0], ratio_most=0.4), row("memory", "peak", "GB", [1.5])])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[-2] == ["train", "step", "s", "2", "(2–2)", "4", "(4–4)", "0.50", "ratio", "≤", "0.4", "NO"]
    assert lines[-1] == ["memory", "peak", "GB", "1.5", "(1.5–1.5)", "–", "–"]


def test_a_process_of_its_own(tmp_path: Path) -> None:
    output, seconds, peak = in_subprocess("import time; time.sleep(0.2); x = b'x' * 200_000_000; print('done')")
    assert output == "done"
    assert seconds > 0.2
    assert 0.2 < peak < 0.4
    with pytest.raises(InputError, match="ValueError: no"):
        in_subprocess("raise ValueError('no')")


def test_timed_waits_for_the_run() -> None:
    assert timed(lambda: sum(range(100_000))) > 0
