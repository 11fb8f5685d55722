"""Which candidates are kept, once the scores are known: rankings, and round-robin over them.

    scores (queries, candidates) ──► one ranking per query, or per task, or one ──► N candidates

Equal scores stand in the order of the data, and equal queries or tasks in the order of their file,
so a choice depends on nothing but the scores.

Source: Ivison et al. 2025 (arXiv 2503.01807), section 3; get_top_*.py of
hamishivi/automated-instruction-selection.
"""

from collections.abc import Sequence

import numpy as np

SELECTIONS = ("tasks", "queries", "global")


def ranking(scores: np.ndarray, allowed: np.ndarray, keep: int) -> np.ndarray:
    """The best `keep` of the candidates `allowed` (n,) bool by scores (n,), the best first."""
    candidates = np.flatnonzero(allowed)
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:keep]]


def round_robin(rankings: list[np.ndarray], keep: int) -> np.ndarray:
    """`keep` candidates: in turn, each ranking gives its best that no other has given.

    A ranking has to hold its best `keep` only: it never passes over more than are taken. One that
    is used up is left out. Returns the candidates in the order in which they were taken.
    """
    taken, turns = {}, [iter(r.tolist()) for r in rankings]
    while turns and len(taken) < keep:
        lasting = []
        for turn in turns:
            candidate = next((c for c in turn if c not in taken), None)
            if candidate is not None and len(taken) < keep:
                taken[candidate] = None
                lasting.append(turn)
        turns = lasting
    return np.array(list(taken), np.int64)


def by_queries(
    scores: np.ndarray, tasks: Sequence[str], allowed: np.ndarray, keep: int, select: str,
    mean: bool = False,
) -> np.ndarray:  # fmt: skip
    """`keep` candidates of `allowed` by their scores (queries, candidates).

    select: "queries", round-robin over the queries; "tasks", round-robin over the tasks of the
    queries, a task's score being the largest of its queries' (mean=True: their mean, as LESS has
    it); "global", the largest score of all. tasks: the task of each query.
    """
    if select == "queries":
        rankings = [ranking(row, allowed, keep) for row in scores]
    elif select == "tasks":
        rankings = [
            ranking(task_scores(scores, tasks, task, mean), allowed, keep)
            for task in dict.fromkeys(tasks)
        ]
    else:
        rankings = [ranking(best_queries(scores)[0], allowed, keep)]
    return round_robin(rankings, keep)


def task_scores(scores: np.ndarray, tasks: Sequence[str], task: str, mean: bool) -> np.ndarray:
    """Scores (candidates,) for one task; one query's row is in memory at a time."""
    total = None
    rows = [q for q, name in enumerate(tasks) if name == task]
    for q in rows:
        row = np.array(scores[q], np.float64 if mean else np.float32)
        total = row if total is None else total + row if mean else np.maximum(total, row)
    return total / len(rows) if mean else total


def best_queries(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each candidate the largest score, and the query that gives it, the first of equals."""
    best, query = np.array(scores[0]), np.zeros(scores.shape[1], np.int64)
    for q in range(1, len(scores)):
        query[scores[q] > best] = q
        best = np.maximum(best, scores[q])
    return best, query


def by_source(
    scores: np.ndarray, sources: Sequence[str], allowed: np.ndarray, keep: int
) -> np.ndarray:
    """`keep` candidates, as many of each source as there are, each source's by scores (n,)."""
    sources = np.array(sources)
    names = dict.fromkeys(sources.tolist())
    return round_robin([ranking(scores, allowed & (sources == n), keep) for n in names], keep)
