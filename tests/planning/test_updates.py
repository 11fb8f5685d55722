"""updates.py: lengths with the published figures, rows as the loops plan them."""

import numpy as np
import pytest

from data import plan_rows, update_members
from plan import read_model
from planning import updates

CONFIG = read_model("7b")


def test_the_mixture_has_the_papers_figures():
    """Mean 1,097, quartiles 230 and 1,464, 63,900 above 2,048, 20 at the limit of 8,192."""
    tokens = updates.mixture().tokens[:, 0]
    assert len(tokens) == 326_154
    assert tokens.mean() == pytest.approx(1097, rel=0.005)
    assert np.percentile(tokens, [25, 75]) == pytest.approx([230, 1464], abs=1)
    assert (tokens > 2048).sum() == pytest.approx(63_900, abs=100)
    assert (tokens >= 8192).sum() == 20


def test_ultrafeedback_has_its_means():
    """Two documents of 490 tokens a pair, 61,966 of them; the limit of 2,048 takes up to 3 %."""
    lengths = updates.ultrafeedback()
    assert lengths.tokens.shape == (61_966, 2)
    assert lengths.tokens.mean() == pytest.approx(490, rel=0.03)
    assert lengths.in_rows.mean() == pytest.approx(185 + 305 + 305, rel=0.03)  # the prompt once
    prompt = lengths.shared[7, 1]
    assert lengths.shared[7, 0] == 0 < prompt
    assert lengths.squares[7] == (lengths.tokens[7] ** 2).sum() - prompt**2
    assert (lengths.trained <= lengths.tokens).all()


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_are_those_of_the_loops(ranks):
    """The first update's, record by record; every rank as many rows."""
    rng = np.random.default_rng(0)
    lengths = updates.spread("random", rng.integers(1, 900, (50, 1)), 0.5)
    planned = updates.sample_updates(lengths, 7, 2, 1000, ranks, CONFIG)
    _, members = update_members(50, 7, 42, 0)
    of_members = lengths.tokens[members, 0]
    rows = plan_rows(of_members, ranks, 1000, CONFIG.hidden_size)
    tokens = [[max(1, of_members[r].sum()) for r in rank] for rank in rows]
    assert [[row.tokens for row in rank] for rank in planned.rows[0]] == tokens
    assert planned.total == 14
    for rank in planned.rows[0]:
        assert all(row.squares <= row.tokens**2 for row in rank)


def test_extent_bounds_every_update():
    """The longest row of all updates, planned or not, and no longer than --micro-tokens."""
    rng = np.random.default_rng(1)
    lengths = updates.spread("random", rng.integers(1, 300, (4000, 1)), 0.5)
    planned = updates.sample_updates(lengths, 16, 2, 1200, 4, CONFIG)
    longest, rows, predicted = updates.extent(planned, 1200)
    assert longest <= 1200 and predicted <= longest
    for step in range(planned.total):
        _, members = update_members(4000, 16, 42, step)
        plan = plan_rows(lengths.tokens[members, 0], 4, 1200, CONFIG.hidden_size)
        assert len(plan[0]) <= rows
        assert all(lengths.tokens[members[r]].sum() <= longest for rank in plan for r in rank)


def test_cut():
    """Sequences end at --max-seq-len, and what is trained of them does not exceed them."""
    cut = updates.cut(updates.mixture(), 1000)
    assert cut.tokens.max() == 1000 and (cut.trained <= cut.tokens).all()


def test_a_share_that_is_held_out_is_not_planned():
    """The rest of the records as they are; none of them with a share of 0."""
    whole = updates.ultrafeedback()
    rest = updates.part(whole, 0.25, 42)
    assert len(rest.tokens) == len(whole.tokens) - len(whole.tokens) // 4
    assert rest.tokens.mean() == pytest.approx(whole.tokens.mean(), rel=0.02)
    assert (rest.shared[:, 1] + rest.trained[:, 1] == rest.tokens[:, 1]).all()  # the same pair's
    assert (updates.part(whole, 0.0, 42).tokens == whole.tokens).all()
    assert len(updates.part(whole, 0.9999999, 42).tokens) == 1


@pytest.mark.parametrize("ranks, micro_tokens", [(1, 90), (1, 10_000), (3, 60), (7, 40), (40, 41)])
def test_the_largest_rows_are_those_of_plan_rows(ranks, micro_tokens):
    """Of all updates at once, exactly: equal lengths, ranks without a record, one row and many."""
    rng = np.random.default_rng(ranks)
    sizes = rng.integers(1, 40, (50, 13))
    trained = rng.integers(1, sizes + 1)
    squares = sizes**2 // rng.integers(1, 3, sizes.shape)
    most = [0, 0, 0]
    for update in zip(sizes, trained, squares, strict=True):
        found = updates.largest_rows(*(a[None] for a in update), ranks, micro_tokens, 2)
        plan = plan_rows(update[0], ranks, micro_tokens, 2, update[2])
        rows = [row for rank in plan for row in rank]
        expected = [max(sum(update[k][row]) for row in rows) for k in (0, 1)] + [len(plan[0])]
        assert list(found) == expected
        most = np.maximum(most, expected)
    found = updates.largest_rows(sizes, trained, squares, ranks, micro_tokens, 2)
    assert list(found) == list(most)
