"""The selection rules against slow oracles that follow their definitions word by word."""

import numpy as np
import pytest

from selection.choose import best_queries, by_queries, by_source, ranking, task_scores

TASKS = ["b", "a", "b", "c", "a"]


def best_left(row, taken):
    """The index of the largest value that is not taken, the first of equals."""
    left = [i for i in range(len(row)) if i not in taken]
    return max(left, key=lambda i: (row[i], -i))


def oracle(rows, allowed, keep):
    """Each row in turn takes its best that is left, one at a time."""
    taken = {i for i in range(len(allowed)) if not allowed[i]}
    picked = []
    while True:
        for row in rows:
            if len(picked) == keep:
                return picked
            picked.append(best_left(row, taken))
            taken.add(picked[-1])


@pytest.mark.parametrize("select", ["queries", "tasks", "global"])
@pytest.mark.parametrize("keep", [1, 7, 20])
@pytest.mark.parametrize("seed", range(4))
def test_choices_equal_a_slow_oracle_with_many_ties(select, keep, seed):
    """37 candidates, five queries of three tasks, scores of only four values; 31 are allowed."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (5, 37)).astype(np.float32) / 4
    allowed = np.ones(37, bool)
    allowed[random.choice(37, 6, replace=False)] = False
    rows = scores.tolist()
    if select == "tasks":
        rows = [
            [max(scores[q, i] for q in range(5) if TASKS[q] == task) for i in range(37)]
            for task in "bac"  # as they come first in TASKS
        ]
    elif select == "global":
        rows = [[max(column) for column in scores.T]]
    assert by_queries(scores, TASKS, allowed, keep, select).tolist() == oracle(rows, allowed, keep)


def test_everything_can_be_kept():
    """Round-robin goes on when rankings have nothing left to give."""
    scores = np.random.default_rng(0).random((3, 11)).astype(np.float32)
    for select in ("queries", "tasks", "global"):
        chosen = by_queries(scores, ["x", "y", "x"], np.ones(11, bool), 11, select)
        assert sorted(chosen) == list(range(11))


def test_a_task_is_its_largest_score_or_the_mean():
    """Of the queries of that task alone."""
    scores = np.array([[1, 0], [9, 9], [0, 2]], np.float32)
    assert task_scores(scores, ["a", "b", "a"], "a", mean=False).tolist() == [1, 2]
    assert task_scores(scores, ["a", "b", "a"], "a", mean=True).tolist() == [0.5, 1]


def test_the_best_query_is_the_first_of_equals():
    """And its score the largest."""
    best, query = best_queries(np.array([[1, 3, 2], [1, 2, 4], [0, 3, 4]], np.float32))
    assert (best.tolist(), query.tolist()) == ([1, 3, 4], [0, 0, 1])


def test_sources_give_alike_until_they_are_used_up():
    """Of 2, 9 and 3 candidates, 11 kept are all of the small ones and the best 6 of the large."""
    sources = ["s"] * 2 + ["l"] * 9 + ["m"] * 3
    scores = np.arange(14, dtype=np.float32)
    chosen = by_source(scores, sources, np.ones(14, bool), 11)
    assert sorted(chosen) == [0, 1, *range(5, 11), 11, 12, 13]


def test_equal_scores_stand_in_the_order_of_the_data():
    """So a ranking of equals is the data's."""
    assert ranking(np.zeros(6), np.arange(6) != 2, 4).tolist() == [0, 1, 3, 4]
