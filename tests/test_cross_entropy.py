"""kernels/cross_entropy.py against its definition in fp64."""

import pytest
import torch

import kernels.cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def make_inputs(N, V, E, dtype, seed=0):
    """hidden, weight, labels, upstream gradient; with hard rows among them, see below."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64)
    hidden = torch.randn(N, E, generator=generator, dtype=torch.float64) / E**0.5
    labels = torch.randint(V, (N,), generator=generator)
    d_nll = torch.randn(N, generator=generator, dtype=torch.float64)
    # Along the label's own weight: a confident row (p -> 1), one whose logits overflow exp unless
    # the maximum is taken off, and one that is as sure of the wrong class.
    for row, size, towards in ((0, 25.0, 0), (1, 400.0, 0), (2, 50.0, 1)):
        if row < N:
            direction = weight[(labels[row] + towards) % V]
            hidden[row] = size * direction / direction.square().sum()
    return hidden.to(dtype), weight.to(dtype), labels, d_nll.to(dtype)


def run(function, hidden, weight, labels, d_nll):
    """nll and both gradients."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    nll = function(hidden, weight, labels)
    nll.backward(d_nll.to(nll.dtype))
    return nll.detach(), hidden.grad, weight.grad


def uniform(*inputs):
    """The form of SFT: gradients in the forward pass."""
    return linear_cross_entropy(*inputs, uniform_gradient=True)


@pytest.mark.parametrize("N, V, E", [(1, 7, 3), (37, 101, 7), (101, 515, 37)])
def test_cpu_equals_the_definition_for_any_upstream_gradient(N, V, E, monkeypatch):
    """nll and gradients in fp64, to rounding, across several chunks and a ragged last one."""
    monkeypatch.setattr(kernels.cross_entropy, "CPU_WORKSPACE", 10 * V * 8)
    inputs = make_inputs(N, V, E, torch.float64)
    exact = run(linear_cross_entropy_reference, *inputs)
    for a, b in zip(run(linear_cross_entropy, *inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_uniform_gradient_is_the_same_gradient():
    """Made in the forward pass and scaled, for a loss that is a multiple of nll.sum()."""
    hidden, weight, labels, _ = make_inputs(37, 101, 7, torch.float64)
    d_nll = torch.full((37,), 0.3, dtype=torch.float64)
    now = run(uniform, hidden, weight, labels, d_nll)
    later = run(linear_cross_entropy, hidden, weight, labels, d_nll)
    for a, b in zip(now, later, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_broken_promise_of_uniformity_is_nan():
    """Never silently the gradient of another loss."""
    inputs = make_inputs(5, 11, 3, torch.float32)
    _, d_hidden, d_weight = run(uniform, *inputs)
    assert d_hidden.isnan().all() and d_weight.isnan().all()


@pytest.mark.parametrize("promised", [False, True])
def test_no_tokens(promised):
    """A row with nothing to predict: no losses, gradients of zero."""
    hidden = torch.zeros(0, 3, requires_grad=True)
    weight = torch.ones(5, 3, requires_grad=True)
    nll = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), promised)
    nll.sum().backward()
    assert nll.shape == (0,) and hidden.grad.shape == (0, 3)
    assert torch.equal(weight.grad, torch.zeros(5, 3))


def test_without_gradients_none_are_made(monkeypatch):
    """Under no_grad (the reference pass of DPO) the forward pass is one matrix product."""
    hidden, weight, labels, _ = make_inputs(5, 11, 3, torch.float32)
    asked = []

    def spy(h, w, y, d_nll=None):
        asked.append(d_nll)
        return h.new_zeros(len(y)), None, None

    monkeypatch.setattr(kernels.cross_entropy, "cross_entropy_cpu", spy)
    with torch.no_grad():
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, uniform_gradient=True)
    assert asked == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    """nll is fp32, gradients have the type of what they belong to."""
    inputs = make_inputs(7, 11, 3, dtype)
    nll, d_hidden, d_weight = run(linear_cross_entropy, *inputs)
    assert (nll.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, dtype, dtype)
