"""Negative log-likelihood of each label from hidden states, without a full matrix of logits.

The head of LLaMA 2 and its loss in one call, for SFT and DPO alike. All N times V = 32,000 logits
would be the largest tensor of a training step, and their gradient as large again; here a workspace
of fixed size holds the logits of some rows at a time.

N predicted tokens, E hidden size, V vocabulary. For a token with hidden state h, label y, logits
z = W h, and g the gradient of the loss with respect to its nll:

    nll = log Σ_c exp(z_c) - z_y      p_c = exp(z_c) / Σ_c exp(z_c)                            (1)
    dz_c = g p_c  for c ≠ y           dz_y = g (p_y - 1) = -g Σ_{c≠y} p_c                      (2)
    dh = Wᵀ dz                        dW = Σ_tokens dz hᵀ                                      (3)

Exponentials are of z - m, m the row's largest logit. The label's gradient is the sum on the right
of (2): p_y - 1 cancels for a confident token, in bf16 to zero from p_y = 0.998 on.

The logits and each product of (3) take 2 N V E FLOPs: three products if g is known beforehand or is
the same for all tokens (SFT), four if logits are made again once g is known (DPO). The rest is
memory traffic; bytes per logit, with 2-byte weights:

              logits   log-softmax    its gradient    products of (3)
    naive     4 out    4 in, 4 out    4 in, 4 out     2 in, twice
    here      4 out    4 in           4 in*, 2 out    2 in, twice      * from the chip's cache
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of logits in a chunk of rows. On CPU, V = 32,000 and E = 256 in fp32 (2 cores), 64 MiB (512
# rows) ran at 116 GFLOP/s, 8 MiB at 81 (matrix products too thin), all 3,000 rows at 99.
CPU_WORKSPACE = 64 << 20
# On CUDA 2,048 rows of V = 32,000. Every chunk reads and writes the fp32 sum of dW once (1 GB at
# E = 4,096): smaller chunks, more traffic. The logits are freed before that sum (500 MiB) becomes
# dW, so the memory used beside inputs and gradients stays below 600 MiB.
CUDA_WORKSPACE = 256 << 20
# On CUDA a chunk's rows are a multiple of this: dh of 1,024 rows at E = 4,096 is 128 tiles of 128 x
# 256 for the 132 multiprocessors of an H100; 2,560 rows are 2.4 rounds, the third half idle.
ROWS = 1024


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor,
                         uniform_gradient: bool = False) -> Tensor:  # fmt: skip
    """nll (N,) fp32 = logsumexp(hidden weightᵀ) - the label's logit, differentiable in both.

    hidden (N, E), weight (V, E), labels (N,) int64; the upstream gradient may be anything. With
    `uniform_gradient=True` the caller promises that the loss is a multiple of nll.sum(): gradients
    are then made in the forward pass, three matrix products instead of four, and scaled by that
    multiple in backward. Where the promise was broken they are NaN.
    """
    make_now = uniform_gradient and torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, labels, make_now, hidden.is_cuda)


def linear_cross_entropy_triton(hidden: Tensor, weight: Tensor, labels: Tensor,
                                uniform_gradient: bool = False) -> Tensor:  # fmt: skip
    """The same by the kernel, on CPU tensors too where Triton interprets (TRITON_INTERPRET=1)."""
    make_now = uniform_gradient and torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, labels, make_now, True)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, from the definition, with all (N, V) logits (fp32, or fp64 for fp64 inputs)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(exact) @ weight.to(exact).T
    return logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """The losses, with gradients made in the forward pass (`make_now`) or in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, make_now: bool,
                by_kernel: bool) -> Tensor:  # fmt: skip
        cross_entropy = cross_entropy_triton if by_kernel else cross_entropy_cpu
        ones = torch.ones(len(labels), device=hidden.device) if make_now else None
        ctx.make_now, ctx.by_kernel, ctx.trained = make_now, by_kernel, ctx.needs_input_grad[1]
        nll, d_hidden, d_weight = cross_entropy(hidden, weight, labels, ones, ctx.trained)
        ctx.save_for_backward(*((d_hidden, d_weight) if make_now else (hidden, weight, labels)))
        return nll

    @staticmethod
    def backward(ctx, d_nll: Tensor) -> tuple:
        if not ctx.make_now:
            cross_entropy = cross_entropy_triton if ctx.by_kernel else cross_entropy_cpu
            gradients = cross_entropy(*ctx.saved_tensors, d_nll, ctx.trained)[1:]
            return gradients[0], gradients[1] if ctx.trained else None, None, None, None
        # Checked without asking the device for the answer: a broken promise turns into NaN, on
        # which the training loop stops. (The sum of one element, or of none where N = 0.)
        uniform = (d_nll == d_nll[:1]).all()
        scale = torch.where(uniform, d_nll[:1].sum(), torch.nan)
        # In place: a second backward pass through the same loss is not possible. And in fp32, part
        # by part: rounded to bf16, the one scale of all gradients would be off by up to 0.4 %.
        d_hidden, d_weight = ctx.saved_tensors
        for part in (*d_hidden.split(ROWS), *d_weight.split(ROWS)):
            part.copy_(part.to(scale.dtype) * scale)
        return d_hidden, d_weight if ctx.trained else None, None, None, None


def cross_entropy_cpu(hidden: Tensor, weight: Tensor, labels: Tensor, d_nll: Tensor | None = None,
                      trained: bool = True) -> tuple:  # fmt: skip
    """nll (N,), and for d_nll (N,) the gradients of hidden and weight (else None, None).

    trained: a weight that is not gets an empty gradient, and its product is not computed.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    h, w = hidden.to(exact), weight.to(exact)
    (N, E), V = h.shape, len(w)
    rows = max(1, CPU_WORKSPACE // (V * h.element_size()))
    workspace = h.new_empty(min(rows, N), V)
    nll, d_hidden, d_weight = h.new_empty(N), None, None
    if d_nll is not None:
        d_hidden, d_weight = h.new_empty(N, E), w.new_zeros((V, E) if trained else 0)
    for i in range(0, N, rows):
        here = slice(i, min(i + rows, N))
        label = labels[here, None]
        z = torch.mm(h[here], w.T, out=workspace[: here.stop - i])  # (rows, V)
        z_label, largest = z.gather(1, label), z.amax(dim=1, keepdim=True)
        z.sub_(largest).exp_()
        others = z.scatter_(1, label, 0.0).sum(dim=1, keepdim=True)  # Σ_{c≠y} exp(z_c - m)
        total = others + (z_label - largest).exp()
        nll[here] = (largest - z_label + total.log())[:, 0]  # (1)
        if d_nll is not None:
            z.scatter_(1, label, -others)  # (2) without g / total, which rows of E, not V, get
            scale = d_nll[here, None].to(exact) / total
            d_hidden[here] = (z @ w) * scale  # (3)
            if trained:
                d_weight.addmm_(z.T, h[here] * scale)  # (3)
    if d_nll is not None:
        d_hidden, d_weight = d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)
    return nll, d_hidden, d_weight


@triton.jit
def softmax_kernel(
    logits, d_logits, labels, d_nll, nll, V, LOGITS_ROW, D_LOGITS_ROW,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nll of one row of fp32 logits by (1) and, in the row's own memory, d_logits by (2).

    In bf16, d_logits are half as wide as logits, so a block is written where it, or an earlier one,
    was read. All threads must have read theirs before: hence the barrier. The row is read to its
    padded end, a multiple of 16, and what lies beyond V is excluded afterwards: a mask by V or by
    the label would turn each 16-byte access into one for each logit.
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
    tl.store(nll + row, m - z_label + tl.log(total))  # (1)
    if GRADIENT:
        g = tl.load(d_nll + row)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.load(logits + c, mask=c < LOGITS_ROW, other=0.0)  # (BLOCK,)
            z = tl.where(c < V, z, -float("inf"))
            d_z = tl.where(c == label, -others, tl.exp(z - m)) * (g / total)  # (2)
            tl.debug_barrier()
            d_z = d_z.to(d_logits.dtype.element_ty)
            tl.store(d_logits + c, d_z, mask=c < LOGITS_ROW)  # (BLOCK,)


def softmax_block(V: int) -> dict[str, int]:
    """Logits of a row read at a time, by 1,024 threads: a multiprocessor has two rows in work.

    On an H100 that is 264 rows, 34 MB: its L2 cache still holds them when they are read again.
    """
    return {"BLOCK": min(16384, triton.next_power_of_2(V)), "num_warps": 32}


@torch.library.custom_op("tulu::cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, d_nll: torch.Tensor | None,
    trained: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """nll, and for d_nll (N,) the gradients of hidden and weight (else two empty tensors)."""
    nll, d_hidden, d_weight = losses_and_sums(hidden, weight, labels, d_nll, trained)
    return nll, d_hidden, d_weight.to(weight.dtype)  # by now the workspace is freed


def losses_and_sums(hidden: Tensor, weight: Tensor, labels: Tensor, d_nll: Tensor | None,
                    trained: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """As `cross_entropy_op`, chunk by chunk; the gradient of weight is a sum in fp32."""
    (N, E), V = hidden.shape, len(weight)
    padded = triton.cdiv(V, 64) * 64  # so that rows begin where wide accesses may
    rows = max(1, CUDA_WORKSPACE // (4 * padded) // ROWS) * ROWS
    workspace = hidden.new_empty(min(rows, N), padded, dtype=torch.float32)
    nll = hidden.new_empty(N, dtype=torch.float32)
    gradient = d_nll is not None
    d_hidden = hidden.new_empty((N, E) if gradient else 0)
    d_weight = None
    for i in range(0, N, rows):
        h = hidden[i : i + rows]
        logits = product(h, weight.T, out=workspace[: len(h), :V])
        # The same memory as elements of hidden's type: row r still begins at logits[r].
        d_logits = workspace[: len(h)].view(hidden.dtype)[:, :V]
        softmax_kernel[(len(h),)](
            logits, d_logits, labels[i : i + rows], d_nll[i : i + rows] if gradient else nll,
            nll[i : i + rows], V, workspace.stride(0), d_logits.stride(0), gradient,
            **softmax_block(V),
        )  # fmt: skip
        if gradient:
            torch.mm(d_logits, weight, out=d_hidden[i : i + rows])  # (3)
            if trained:
                d_weight = product(d_logits.T, h, add_to=d_weight)  # (3)
    if d_weight is None:  # no gradient is asked for, or there are no tokens
        d_weight = weight.new_zeros((V, E) if gradient and trained else 0)
    return nll, d_hidden, d_weight


def product(a: Tensor, b: Tensor, out: Tensor | None = None,
            add_to: Tensor | None = None) -> Tensor:  # fmt: skip
    """a b in fp32 from 16-bit factors: added to `add_to`, else written to `out` or new memory."""
    if not a.is_cuda:  # the interpreter's side: torch has no such product on CPU
        a, b = a.float(), b.float()
        return torch.mm(a, b, out=out) if add_to is None else add_to.addmm_(a, b)
    if add_to is None:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.addmm(add_to, a, b, out_dtype=torch.float32, out=add_to)


@cross_entropy_op.register_fake
def _(hidden, weight, labels, d_nll, trained=True):
    nll = hidden.new_empty(len(hidden), dtype=torch.float32)
    if d_nll is None:
        return nll, hidden.new_empty(0), weight.new_empty(0)
    return nll, torch.empty_like(hidden), weight.new_empty(weight.shape if trained else 0)


def cross_entropy_triton(hidden: Tensor, weight: Tensor, labels: Tensor,
                         d_nll: Tensor | None = None, trained: bool = True) -> tuple:  # fmt: skip
    """As `cross_entropy_cpu`, by the kernel."""
    if d_nll is not None:
        d_nll = d_nll.float().contiguous()
    tensors = (x.contiguous() for x in (hidden, weight, labels))
    return cross_entropy_op(*tensors, d_nll, trained)
