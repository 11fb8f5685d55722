"""progress.py: what a log file gets of a bar."""

import sys

import pytest

from program import progress
from program.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]`: the seconds that have gone by."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def lines(capsys):
    shown = capsys.readouterr().err
    assert "\r" not in shown and (not shown or shown.endswith("\n"))
    return shown.splitlines()


def test_a_log_gets_a_line_every_twentieth(capsys, clock):
    """Whole lines, the last at the end, however many updates; with what the bar was told."""
    bar = progress_bar(total=1000, initial=500, unit="update")
    for k in range(500):
        bar.set_postfix_str(f"loss {k}", refresh=False)
        bar.update()
    bar.close()
    shown = lines(capsys)
    assert len(shown) == 10
    assert " 55%" in shown[0] and "550/1000" in shown[0] and "loss 49" in shown[0]
    assert "1000/1000" in shown[-1]


def test_a_log_gets_a_line_every_half_minute(capsys, clock):
    """Where a twentieth takes longer."""
    bar = progress_bar(total=1000, unit="update")
    for _ in range(40):
        clock[0] += 10
        bar.update()
    assert len(lines(capsys)) == 13
    bar.close()
    assert len(lines(capsys)) == 1


def test_only_one_rank_speaks(capsys):
    """A bar that is disabled shows nothing."""
    bar = progress_bar(total=10, disable=True)
    bar.update(10)
    bar.close()
    assert not lines(capsys)


def test_what_does_not_stay_leaves_no_last_line(capsys, clock):
    """As the reference's bar, which a terminal clears."""
    bar = progress_bar(total=1000, leave=False)
    bar.update(49)
    bar.close()
    assert not lines(capsys)


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    """One line, drawn again and again."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress_bar(total=1000, mininterval=0)
    for _ in range(5):
        bar.update()
    bar.close()
    assert capsys.readouterr().err.count("\r") >= 5
