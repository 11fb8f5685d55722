"""Negative log-likelihood of each label from hidden states, without a full matrix of logits.

The head and the loss of LLaMA 2 in one call of model.py's `Llama.forward`, for SFT and DPO alike.
N tokens times V = 32,000 logits would be the largest tensor of the whole step, and its gradient as
large again; here a fixed workspace holds the logits of some rows at a time.

Shapes: N predicted tokens, E hidden size, V vocabulary.

For a token with hidden state h, label y, logits z = W h, and g the gradient of the loss with
respect to its nll:

    nll = log Σ_c exp(z_c) - z_y      p_c = exp(z_c) / Σ_c exp(z_c)                            (1)
    dz_c = g p_c  for c ≠ y           dz_y = g (p_y - 1) = -g Σ_{c≠y} p_c                      (2)
    dh = Wᵀ dz                        dW = Σ_tokens dz hᵀ                                      (3)

All exponents are taken after the row's largest logit m. The label's gradient is the sum on the
right of (2): p_y - 1 cancels for a confident token, in bf16 to nothing from p_y = 0.998 on, and
what is left of its gradient with it.

Logits, (3) twice: three matrix products of 2 N V E FLOPs if g is known beforehand or is the same
for all tokens (SFT), four if the logits have to be made again once g is known (DPO). Next to them
everything else is memory traffic, per logit, with 2-byte weights: naive 4 B written, 4 read for
log-softmax, 4 written, 4 read and 4 written for its gradient, 2 twice for the products; here 4
written, 4 read (again from the cache), 2 written, 2 read twice, and all of it in one workspace.
"""

import torch
import triton
import triton.language as tl

# Bytes of logits held at a time. On CPU, V = 32,000 and E = 256 in fp32 (2 cores): 64 MB (512 rows)
# ran at 116 GFLOP/s, 8 MB at 81 (matrix products too flat), all 3,000 rows at 99 (out of cache).
CPU_WORKSPACE = 64 << 20
# On CUDA 2,048 rows of V = 32,000 in fp32. Every chunk also reads and writes the fp32 sum of dW
# once (1 GB at E = 4,096), which many rows must share; with that sum (500 MiB, of which dW itself
# takes the place of 250 at the end) the working memory stays below 600 MiB.
CUDA_WORKSPACE = 256 << 20
# Rows come in multiples of this, whatever V: 1,024 rows times E = 4,096 are 128 tiles of 128 x 256,
# about one for each multiprocessor of an H100 (132). Fewer would not fill it; 2,560, computed here
# as 2.4 rounds of tiles, would leave it a fifth idle in the third.
ROWS = 1024


def linear_cross_entropy(hidden, weight, labels, uniform_gradient=False):
    """nll (N,) fp32 = logsumexp(hidden weightᵀ) - the label's logit, differentiable in both.

    hidden (N, E), weight (V, E), labels (N,) int64. Any upstream gradient is right. With
    `uniform_gradient=True` the caller promises that the loss is a multiple of nll.sum(): gradients
    are then made in the forward pass, three matrix products instead of four, and scaled by that
    multiple in backward; where the promise was broken they are NaN.
    """
    chunked = cross_entropy_triton if hidden.is_cuda else cross_entropy_cpu
    make_now = uniform_gradient and torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, labels, make_now, chunked)


def linear_cross_entropy_triton(hidden, weight, labels, uniform_gradient=False):
    """The same by the kernel, on CPU tensors too where Triton interprets (TRITON_INTERPRET=1)."""
    make_now = uniform_gradient and torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, labels, make_now, cross_entropy_triton)


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


@triton.jit
def softmax_kernel(
    logits, d_logits, labels, d_nll, nll, V, LOGITS_ROW, D_LOGITS_ROW,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nll of one row of fp32 logits by (1) and, in the row's own memory, d_logits by (2).

    d_logits are half as wide where they are bf16, so a block is written where it, or an earlier
    one, was read: only after all threads have read theirs, hence the barrier. The row is read to
    its padded end, a multiple of 16, and what lies beyond V put out of count afterwards: a mask by
    V or by the label would turn the 16-byte accesses into one for each logit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * LOGITS_ROW
    d_logits += row * D_LOGITS_ROW
    label = tl.load(labels + row)
    z_label = tl.load(logits + label)
    m = z_label
    others = 0.0  # Σ_{c≠y} exp(z_c - m)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = tl.load(logits + c, mask=c < LOGITS_ROW, other=0.0)  # (BLOCK,)
        z = tl.where((c < V) & (c != label), z, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, axis=0))
        others = others * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), axis=0)
        m = m_new
    total = others + tl.exp(z_label - m)
    tl.store(nll + row, m - z_label + tl.log(total))
    if GRADIENT:
        g = tl.load(d_nll + row)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.load(logits + c, mask=c < LOGITS_ROW, other=0.0)  # (BLOCK,)
            z = tl.where(c < V, z, -float("inf"))
            d_z = tl.where(c == label, -others, tl.exp(z - m)) * (g / total)
            tl.debug_barrier()
            d_z = d_z.to(d_logits.dtype.element_ty)
            tl.store(d_logits + c, d_z, mask=c < LOGITS_ROW)  # (BLOCK,)


def softmax_block(V):
    """Logits read at a time, by all threads of a multiprocessor's half.

    Two rows to a multiprocessor: 264 of an H100 are 34 MB, which its L2 cache still holds when the
    second pass reads them again.
    """
    return {"BLOCK": min(16384, triton.next_power_of_2(V)), "num_warps": 32}


@torch.library.custom_op("tulu::cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, d_nll: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nll, and for d_nll (N,) the gradients of hidden and weight (else two empty tensors)."""
    (N, E), V = hidden.shape, len(weight)
    padded = triton.cdiv(V, 64) * 64  # so that rows begin where wide accesses may
    rows = max(1, CUDA_WORKSPACE // (4 * padded) // ROWS) * ROWS
    workspace = hidden.new_empty(min(rows, N), padded, dtype=torch.float32)
    nll = hidden.new_empty(N, dtype=torch.float32)
    gradient = d_nll is not None
    d_hidden = hidden.new_empty((N, E) if gradient else 0)
    d_weight = weight.new_zeros((V, E) if gradient and N == 0 else 0, dtype=torch.float32)
    for i in range(0, N, rows):
        h = hidden[i : i + rows]
        logits = product(h, weight.T, workspace[: len(h), :V])
        # The same memory as elements of hidden's type: row r still begins at logits[r].
        d_logits = workspace[: len(h)].view(hidden.dtype)[:, :V]
        softmax_kernel[(len(h),)](
            logits, d_logits, labels[i : i + rows], d_nll[i : i + rows] if gradient else nll,
            nll[i : i + rows], V, workspace.stride(0), d_logits.stride(0), gradient,
            **softmax_block(V),
        )  # fmt: skip
        if gradient:
            torch.mm(d_logits, weight, out=d_hidden[i : i + rows])
            d_weight = product(d_logits.T, h, None if i == 0 else d_weight, accumulate=i > 0)
    workspace = logits = d_logits = None  # freed before the last line asks for memory
    return nll, d_hidden, d_weight.to(weight.dtype)


def product(a, b, out, accumulate=False):
    """out = a b, or out += a b, in fp32 from 16-bit factors."""
    if not a.is_cuda:  # the interpreter's side: torch has no such product on CPU
        a, b = a.float(), b.float()
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@cross_entropy_op.register_fake
def _(hidden, weight, labels, d_nll):
    (N, E), V = hidden.shape, len(weight)
    nll = hidden.new_empty(N, dtype=torch.float32)
    if d_nll is None:
        return nll, hidden.new_empty(0), weight.new_empty(0)
    return nll, hidden.new_empty(N, E), weight.new_empty(V, E)


def cross_entropy_triton(hidden, weight, labels, d_nll=None):
    """What `cross_entropy_cpu` does, by the kernel."""
    if d_nll is not None:
        d_nll = d_nll.float().contiguous()
    return cross_entropy_op(hidden.contiguous(), weight.contiguous(), labels.contiguous(), d_nll)
