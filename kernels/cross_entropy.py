"""Negative log-likelihood of each label from hidden states, without a full matrix of logits.

The head and the loss of LLaMA 2 in one call of model.py's `Llama.forward`, for SFT and DPO alike.
N tokens times V = 32,000 logits would be the largest tensor of the whole step, and its gradient as
large again; here a fixed workspace holds the logits of some rows at a time.

Shapes: N predicted tokens, E hidden size, V vocabulary.
"""

import torch

# Bytes of logits held at a time. On CPU, V = 32,000 and E = 256 in fp32 (2 cores): 64 MB (512 rows)
# ran at 116 GFLOP/s, 8 MB at 81 (matrix products too flat), all 3,000 rows at 99 (out of cache).
CPU_WORKSPACE = 64 << 20


def linear_cross_entropy(hidden, weight, labels, uniform_gradient=False):
    """nll (N,) fp32 = logsumexp(hidden weightᵀ) - the label's logit, differentiable in both.

    hidden (N, E), weight (V, E), labels (N,) int64. Any upstream gradient is right. With
    `uniform_gradient=True` the caller promises that the loss is a multiple of nll.sum(): gradients
    are then made in the forward pass, three matrix products instead of four, and scaled by that
    multiple in backward; where the promise was broken they are NaN.
    """
    make_now = uniform_gradient and torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, labels, make_now, cross_entropy_cpu)


def linear_cross_entropy_reference(hidden, weight, labels):
    """The same, from the definition, with all (N, V) logits (fp32, or fp64 for fp64 inputs)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(exact) @ weight.to(exact).T
    return logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """Autograd around `chunked`, which is `cross_entropy_cpu` or its like on another device."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, make_now, chunked):
        ones = torch.ones(len(labels), device=hidden.device) if make_now else None
        nll, d_hidden, d_weight = chunked(hidden, weight, labels, ones)
        ctx.make_now, ctx.chunked = make_now, chunked
        ctx.save_for_backward(*((d_hidden, d_weight) if make_now else (hidden, weight, labels)))
        return nll

    @staticmethod
    def backward(ctx, d_nll):
        if not ctx.make_now:
            return *ctx.chunked(*ctx.saved_tensors, d_nll)[1:], None, None, None
        d_hidden, d_weight = ctx.saved_tensors
        # Checked without asking the device for the answer: a broken promise turns into NaN, on
        # which the training loop stops. (The sum of one element, or of none where N = 0.)
        uniform = (d_nll == d_nll[:1]).all()
        scale = torch.where(uniform, d_nll[:1].sum(), torch.nan)
        d_hidden, d_weight = (x.mul_(scale.to(x.dtype)) for x in (d_hidden, d_weight))
        return d_hidden, d_weight, None, None, None


def cross_entropy_cpu(hidden, weight, labels, d_nll=None):
    """nll (N,), and for d_nll (N,) the gradients of hidden and weight (else None, None)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    h, w = hidden.to(exact), weight.to(exact)
    (N, E), V = h.shape, len(w)
    rows = max(1, CPU_WORKSPACE // (V * h.element_size()))
    workspace = h.new_empty(min(rows, N), V)
    nll, d_hidden, d_weight = h.new_empty(N), None, None
    if d_nll is not None:
        d_hidden, d_weight = h.new_empty(N, E), torch.zeros_like(w)
    for i in range(0, N, rows):
        here = slice(i, min(i + rows, N))
        label = labels[here, None]
        z = torch.mm(h[here], w.T, out=workspace[: here.stop - i])  # (rows, V) logits
        z_label, largest = z.gather(1, label), z.amax(dim=1, keepdim=True)
        z.sub_(largest).exp_()
        # Of the softmax e/Σe, the true class's gradient is p - 1 = -(Σ of the others)/Σe: summed,
        # not subtracted, so that it survives p -> 1.
        others = z.scatter_(1, label, 0.0).sum(dim=1, keepdim=True)
        total = others + (z_label - largest).exp()
        nll[here] = (largest - z_label + total.log())[:, 0]
        if d_nll is not None:
            z.scatter_(1, label, -others)
            # Rows are divided by Σe and weighted here, where they are E and not V long.
            scale = d_nll[here, None].to(exact) / total
            d_hidden[here] = (z @ w) * scale
            d_weight.addmm_(z.T, h[here] * scale)
    if d_nll is not None:
        d_hidden, d_weight = d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)
    return nll, d_hidden, d_weight
