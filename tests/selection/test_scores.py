"""Scores on disk: what is there is not computed again, what is missing is."""

import numpy as np
import pytest

from program.ranks import start
from selection.scores import fill, missing, open_scores

GROUPS = [[4, 0], [6], [1, 5, 2], [3]]


@pytest.fixture(autouse=True)
def group():
    start()


def score(members):
    """Three queries' scores of some candidates: 10 times the query plus the candidate."""
    return np.array([[10 * q + i for i in members] for q in range(3)], np.float32)


def test_only_what_is_missing_is_computed(tmp_path):
    """After a kill in the third group, the next run computes that one and the last."""
    scores, seen = open_scores(tmp_path / "s", (3, 7)), []

    def killed(members):
        if members == GROUPS[2]:
            raise KeyboardInterrupt
        return score(members)

    with pytest.raises(KeyboardInterrupt):
        fill(scores, GROUPS, np.ones(7), killed, "test")
    assert np.flatnonzero(missing(scores)).tolist() == [1, 2, 3, 5]
    again = open_scores(tmp_path / "s", (3, 7))
    fill(again, GROUPS, np.ones(7), lambda members: seen.append(members) or score(members), "test")
    assert seen == GROUPS[2:]
    assert np.array_equal(open_scores(tmp_path / "s", (3, 7)), score(range(7)))


def test_a_file_of_another_size_is_made_again(tmp_path):
    """One that was cut short, for example."""
    scores = open_scores(tmp_path / "s", (2, 5))
    scores[:] = 1
    (tmp_path / "s").write_bytes(b"\0" * 36)
    assert missing(open_scores(tmp_path / "s", (2, 5))).all()
