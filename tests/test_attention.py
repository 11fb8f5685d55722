"""kernels/attention.py against its definition in fp64."""

import pytest
import torch

from kernels.attention import attention, attention_layout, attention_reference

# Lengths of the documents of a row: odd ones, of one token, one alone, many tiny ones.
ROWS = [[37], [1], [1, 1, 5, 1], [7, 101, 1, 37], [3] * 30]


def doc_start_of(lengths):
    """doc_start (T,) int32 of documents laid end to end."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths)).int()


def make_inputs(lengths, H, Hk, D, dtype, seed=0):
    """q, k, v and an upstream gradient; keys grow along the row, so that maxima arrive late."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    q, k, v, d_out = (
        torch.randn(T, heads, D, generator=generator, dtype=torch.float64)
        for heads in (H, Hk, Hk, H)
    )
    k = k * torch.linspace(0.5, 4, T, dtype=torch.float64)[:, None, None]
    return [x.to(dtype) for x in (q, k, v, d_out)]


def run(function, q, k, v, d_out, *rest):
    """Output and the three gradients."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, *rest)
    out.backward(d_out)
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("H, Hk", [(4, 4), (4, 2), (8, 1)])
def test_attention_on_cpu_equals_the_definition(lengths, H, Hk):
    """Output and every gradient, per document, for grouped heads, in fp64 to rounding."""
    inputs = make_inputs(lengths, H, Hk, 16, torch.float64)
    doc_start = doc_start_of(lengths)
    ours = run(attention, *inputs, doc_start)
    exact = run(attention_reference, *inputs, doc_start)
    for a, b in zip(ours, exact, strict=True):
        # fp64 rounds at 1e-16; scores reach about 50, sums run over at most 101 tokens.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_layout_holds_the_lengths_and_changes_nothing():
    """The layout made once per row is what `attention` would make itself."""
    lengths = [5, 1, 9]
    doc_start = doc_start_of(lengths)
    assert attention_layout(doc_start) == lengths
    q, k, v, _ = make_inputs(lengths, 2, 1, 16, torch.float32)
    with_layout = attention(q, k, v, doc_start, attention_layout(doc_start))
    assert torch.equal(with_layout, attention(q, k, v, doc_start))


def test_empty_row():
    """A row of no tokens has an empty output and empty gradients."""
    inputs = [torch.zeros(0, heads, 16) for heads in (4, 2, 2, 4)]
    out, dq, dk, dv = run(attention, *inputs, torch.zeros(0, dtype=torch.int32))
    assert out.shape == dq.shape == (0, 4, 16) and dk.shape == dv.shape == (0, 2, 16)
