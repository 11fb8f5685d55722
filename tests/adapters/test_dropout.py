"""dropout.py: how much is dropped, and that each draw depends on what it may depend on alone."""

import pytest
import torch

from adapted import adapted
from adapters.dropout import Dropout

T, K = 300, 500


def draws(ids, lengths, share=0.1, seed=0, update=0, number=0):
    """(T, K) bool: what of ones is dropped in a row of documents of these lengths."""
    dropout = Dropout(share, seed)
    dropout.update = update
    positions = torch.cat([torch.arange(n) for n in lengths])
    dropout.begin_row(lambda *_: None, ids, positions, None)
    out = dropout.drop(torch.ones(len(ids), K), dropout.feature_keys(number, K))
    assert torch.equal(out.unique(), torch.tensor([0, 1 / (1 - share)]))
    return out == 0


def ids(seed=0, n=T):
    return torch.randint(3, 361, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_dropped_of_each_token_and_feature_independently(share):
    """All means lie within 5 standard deviations of a fair coin's, and so do all correlations."""
    dropped = draws(ids(), [T // 3] * 3, share).double()
    z = (dropped - share) / (share * (1 - share)) ** 0.5  # mean 0, variance 1
    assert z.mean().abs() < 5 / (T * K) ** 0.5
    assert z.mean(0).abs().max() < 5 / T**0.5
    assert z.mean(1).abs().max() < 5 / K**0.5
    for correlations, n in ((z.T @ z, T), (z @ z.T, K)):
        correlations = correlations.fill_diagonal_(0) / n
        # Of 125,000 numbers, the largest of fair ones is at 4.5 or so.
        assert correlations.abs().max() < 6.5 / n**0.5
        assert correlations.std() == pytest.approx(n**-0.5, rel=0.05)


def test_a_draw_depends_on_seed_update_adapter_document_and_position():
    """Another of any of them: other draws, as different as unrelated ones (0.1 · 0.9 twice)."""
    row, lengths = ids(), [100, 200]
    first = draws(row, lengths)
    other_ids = row.clone()
    other_ids[50] += 1  # one token of the first document
    others = [draws(row, lengths, **c) for c in ({"seed": 1}, {"update": 1}, {"number": 1})]
    others += [draws(row, [T]), draws(other_ids, lengths)[:100], first.roll(1, 0)]
    for other in others:
        differ = (other[:100] != first[:100]).double().mean()
        assert differ == pytest.approx(0.18, abs=5 * (0.18 * 0.82 / (100 * K)) ** 0.5)


def test_a_draw_does_not_depend_on_the_row():
    """A document's draws are those it has alone, wherever it stands."""
    row = ids()
    first = draws(row, [100, 200])
    assert torch.equal(draws(other := row[100:], [200]), first[100:])
    assert torch.equal(draws(torch.cat([other, row[:100]]), [200, 100])[200:], first[:100])


def test_nothing_is_dropped_where_no_gradient_is_recorded(wide):
    """An evaluation, or DPO's reference, is the model's own; a share of 0 is none at all."""
    model, plain = (adapted(wide, stir=True, lora_dropout=share) for share in (0.4, 0.0))
    row = ids(n=20), torch.zeros(20, dtype=torch.int32), torch.arange(20)
    with torch.no_grad():
        assert torch.equal(model(*row), plain(*row))
    assert not torch.equal(model(*row), plain(*row))
