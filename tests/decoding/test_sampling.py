"""sampling.py: tokens come as often as their probabilities say; which characters may be shown."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from decoding.sampling import Sampling, choose, complete
from program.errors import RunError


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (1.0, 1e-9)])
def test_sampling_has_the_softmax_distribution(temperature, top_p):
    """Over an even grid of u, tokens come in proportion to their probability within top_p."""
    logits = torch.randn(13, generator=torch.Generator().manual_seed(0)) * 2
    p = (logits.double() / temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for token in order:  # the definition: the fewest likeliest with at least top_p together
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token].item()
    n = 2000

    grid = iter((k + 0.5) / n for k in range(n))
    sources = [SimpleNamespace(random=SimpleNamespace(random=lambda: next(grid)))] * n
    sampling = Sampling(temperature=temperature, top_p=top_p)
    counts = Counter(choose(logits.expand(n, -1), sources, sampling).tolist())
    assert set(counts) <= set(kept)
    for token in kept:  # a grid of n points counts an interval's length to 1/n
        assert counts[token] / n == pytest.approx(p[token].item() / mass, abs=1.5 / n)


@pytest.mark.parametrize("temperature", [1e-45, 5e-324, 1e-7, 1e300])
def test_extreme_temperatures_are_no_error(temperature):
    """So cold that a quotient would overflow: the likeliest. So hot that all are alike: the even
    distribution, in which u = 0.9 picks one of the last tenth."""
    logits = torch.tensor([[1.0, 3.0, 2.0, -1e4, 2.9999, 0.0, 0.1, 0.2, 0.3, 0.4]])
    source = SimpleNamespace(random=SimpleNamespace(random=lambda: 0.95))
    drawn = choose(logits, [source], Sampling(temperature=temperature)).item()
    if temperature < 1:
        assert drawn == 1
    else:
        p = torch.zeros(10).softmax(0)
        assert drawn == p.topk(10)[1][9].item()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_flat_row_beside_a_peaked_one_keeps_all_its_tokens(top_p):
    """Of 400 tokens, nearly equal, as many are drawn as have top_p together: over 256."""
    peaked, flat = torch.zeros(400), torch.linspace(0.01, 0, 400)
    peaked[7] = 50.0
    cumulative = flat.double().softmax(0).cumsum(0)  # the likeliest stand first
    n, kept = 2000, 1 + (cumulative < top_p * (1 - 1e-9)).sum().item()
    drawn = set()
    for k in range(n):  # two rows at a time, both with the same u
        source = SimpleNamespace(random=SimpleNamespace(random=lambda k=k: (k + 0.5) / n))
        pair = choose(torch.stack([peaked, flat]), [source] * 2, Sampling(1, 1.0, top_p)).tolist()
        assert pair[0] == 7
        drawn.add(pair[1])
    assert drawn == set(range(kept)) and kept > 256


def test_top_p_that_is_reached_exactly_admits_no_further_token():
    """Two of four equally likely tokens have 0.5 together: the other two are never drawn."""
    grid = iter((k + 0.5) / 40 for k in range(40))
    sources = [SimpleNamespace(random=SimpleNamespace(random=lambda: next(grid)))] * 40
    drawn = choose(torch.zeros(40, 4), sources, Sampling(temperature=1.0, top_p=0.5))
    assert len(drawn.unique()) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature):
    """They end the run: no token is chosen."""
    sources = [SimpleNamespace(random=SimpleNamespace(random=lambda: 0.5))] * 2
    logits = torch.zeros(2, 7)
    logits[1, 3] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        choose(logits, sources, Sampling(temperature=temperature))


def test_pieces_are_whole_characters_and_no_half_stop():
    """What may still become a character or a stop string is held back."""
    assert complete("caf\ufffd", ()) == 3
    assert complete("caf\ufffd\ufffd", ("x",)) == 3
    assert complete("one\n", ("\nclass",)) == 3
    assert complete("one\ncla", ("\nclass", "a!")) == 3
    assert complete("one\nclan", ("\nclass",)) == 8
    assert complete("caf\ufffd", ("fé",)) == 2  # the character may become the rest of it
