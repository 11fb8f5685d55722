"""Causal attention inside each document of a packed row: on CPU through torch, on CUDA in Triton.

Queries, keys and values of documents laid end to end go in, the heads' outputs come out. The query
heads of a group read their key/value head where it lies; nothing is repeated in memory. It follows
FlashAttention (Dao et al. 2022, arXiv 2205.14135) and FlashAttention-2 (Dao, arXiv 2307.08691).

Shapes: T tokens of the row, H query heads, Hk key/value heads (H a multiple of Hk), D head size.

Forward. For query i of one head, over the keys j of its document up to itself:

    s_ij = q_i·k_j / sqrt(D)      p_ij = exp(s_ij) / Σ_j exp(s_ij)      o_i = Σ_j p_ij v_j      (1)

Keys come tile by tile, with a running maximum m, sum l and unnormalised output a of row i:

    m' = max(m, max_j s_ij)       r = exp(m - m')                                              (2)
    l' = l r + Σ_j exp(s_ij - m')                a' = a r + Σ_j exp(s_ij - m') v_j             (3)

After any tile l = Σ exp(s_ij - m) and a = Σ exp(s_ij - m) v_j over the keys so far: (3) adds the
new terms and multiplies the old ones by r, which moves them from maximum m to m'. At the end a / l
is (1), numerator and denominator times exp(-m): exact, and no exponent is positive. Backward makes
p again from one number a row, L_i = m + log l (`lse`), since p_ij = exp(s_ij - L_i).

Backward. Given dO, with (1) differentiated:

    dv_j = Σ_i p_ij do_i          dp_ij = do_i·v_j                                             (4)
    ds_ij = p_ij (dp_ij - D_i)    D_i = Σ_j p_ij dp_ij = do_i·Σ_j p_ij v_j = do_i·o_i          (5)
    dq_i = Σ_j ds_ij k_j / sqrt(D)               dk_j = Σ_i ds_ij q_i / sqrt(D)                (6)

The softmax's Jacobian needs all of row i only through D_i (`delta`), and (5) takes D_i from the
output. dk and dv are sums over all query heads that read the key head.

Cost of a document of n tokens, per query head, n²/2 pairs, 2-byte elements:

                FLOPs     bytes to memory, naive                        fused
    forward     2 n² D    4 n² (s and p: out, in)                       8 n D (q, k, v, o)
    backward    5 n² D    7 n² (p in twice; dp out, in; ds out, twice)  16 n D (and do, dq, dk, dv)

In the naive form the n² terms dominate once n > 2 D. Here one kernel makes dq and another dk and
dv, and both make s and dp again: 7 n² D and 24 n D, in return for sums without atomics, which have
the same bits in every run.

Tiles. A row of documents A and B, one character a token; queries and keys in tiles of 4:

    keys            AAAAAAAAAAAAAABBBBBBBB
    queries  0- 3   [D ]                        F  full: every query sees every key, no mask
             4- 7   [F ][D ]                    D  up to the diagonal, with a mask
             8-11   [F ][F ][D ]                E  queries of two documents, with a mask
            12-15   [E ][E ][E ][E ]
            16-19                 [D ][D ]      what is blank is never read
            20-21                 [F ][D ]

Tiles of queries are cut from the row whatever its documents, so many short documents share one.
Each walks along its keys from left to right, from where its first document begins. For dk and dv a
tile of keys is cut from the row, and walks downwards along its queries.
"""

import math

import torch
import triton
import triton.language as tl
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention_tiles import branches


def attention(q, k, v, doc_start, doc_end=None, tiles=None):
    """softmax(q kᵀ / sqrt(D)) v, where token i sees j with doc_start[i] <= j <= i < doc_end[j].

    q (T, H, D), k and v (T, Hk, D), doc_start and doc_end (T,) int32 -> out (T, H, D) in the dtype
    of q. The softmax is in fp32. Without doc_end documents end where the next begins. tiles:
    `attention_tiles` of both, on the device of q; made here, for which a GPU waits, if it is None.
    """
    if q.is_cuda:
        return attention_triton(q, k, v, doc_start, doc_end, tiles)
    doc_end = document_ends(doc_start) if doc_end is None else doc_end
    return attention_cpu(q, k, v, doc_start, doc_end)


def document_ends(doc_start):
    """doc_end (T,) int32 without pairs: one past the last token of each token's document.

    doc_start is sorted, so a search in itself finds the ends, without waiting for a GPU.
    """
    return torch.searchsorted(doc_start, doc_start, right=True, out_int32=True)


def attention_reference(q, k, v, doc_start, doc_end=None):
    """The same, from the definition: a (T, T) mask and every key/value head repeated."""
    (T, H, D), Hk = q.shape, k.shape[1]
    doc_end = document_ends(doc_start) if doc_end is None else doc_end
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)
    seen = (doc_start[:, None] <= j) & (j <= i) & (i < doc_end)  # (T, T)
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(exact).repeat_interleave(H // Hk, dim=1) for x in (k, v))  # (T, H, D)
    scores = torch.einsum("ihd,jhd->hij", q.to(exact), k) / math.sqrt(D)
    p = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)  # (H, T, T)
    return torch.einsum("hij,jhd->ihd", p, v).to(q.dtype)


@torch.compiler.disable  # it would be compiled again for the lengths of every row
def attention_cpu(q, k, v, doc_start, doc_end):
    """One call of torch's blocked CPU attention per document, and per branch that has holes.

    A pair takes two: prompt and chosen are like a document, and rejected is the end of another one.
    `split`, not slices: the backward of a slice fills a tensor as long as the row, per document.
    Padding documents of similar length into one call was no faster at about 190 tokens each.
    """
    first, end, paths = branches(doc_start.numpy(), doc_end.numpy())
    calls = []  # branches of queries, branches of keys; the queries are the last of the keys
    for branch, path in enumerate(paths):
        if path[:-1] and path[-2] == branch - 1:  # goes on where the last call ends
            calls[-1] = calls[-1][0] + [branch], path
        else:
            calls.append(([branch], path))
    lengths = (end - first).tolist()
    if not lengths:  # an empty row: one document, so that q, k and v get their gradients
        lengths, calls = [0], [([0], [0])]
    q, k, v = (x.split(lengths) for x in (q, k, v))
    outs = []
    for queries, keys in calls:
        of_parts = ((q, queries), (k, keys), (v, keys))
        tensors = (x[b[0]] if len(b) == 1 else torch.cat([x[i] for i in b]) for x, b in of_parts)
        q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in tensors)  # (1, H or Hk, tokens, D)
        n, m, mask = q_b.shape[2], k_b.shape[2], None
        if n < m:  # query i is token i + m - n of the keys
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        out = scaled_dot_product_attention(q_b, k_b, v_b, mask, is_causal=n == m, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


# The kernels. A program has one tile of queries (or of keys) of one head, and alone makes its sums,
# in a fixed order. Its walk has two parts, F, then D and E of the picture: one loop body, compiled
# without the mask and with it. The softmax is to base 2: s log2 e in place of s, exp2 of it, and
# so `lse` is log2 of (1)'s denominator.

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x log2 e); the chip has exp2 only
LOW = tl.constexpr(-1e30)  # the maximum before any key: finite, because inf - inf is NaN
DOT = tl.constexpr("ieee")  # fp32 inputs are multiplied in fp32, not in tf32
PAD = tl.constexpr(128)  # lse and delta are (H, T rounded up to this): whole tiles, no masks


@triton.jit
def load_tile(base, start, T, STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Rows start, start + 1, … of a (T, D) matrix -> (ROWS, D rounded up to a power of 2).

    Rows beyond T repeat the last row: finite numbers, whose results are masked or never stored. (A
    mask of rows takes registers, and spilled at D = 128. The mask of columns costs nothing: the
    compiler knows it.) The start is added in 64 bits, the offsets within the tile in 32.
    """
    rows = tl.minimum(tl.arange(0, ROWS), T - 1 - start)[:, None]
    columns = tl.arange(0, triton.next_power_of_2(D))[None, :]
    pointers = base + tl.cast(start, tl.int64) * STRIDE + (rows * STRIDE + columns)
    return tl.load(pointers, mask=columns < D, other=0.0)


@triton.jit
def store_tile(base, tile, start, T, STRIDE: tl.constexpr, D: tl.constexpr):
    """Write the rows and columns of a tile that exist."""
    rows = tl.arange(0, tile.shape[0])[:, None]
    columns = tl.arange(0, tile.shape[1])[None, :]
    pointers = base + tl.cast(start, tl.int64) * STRIDE + (rows * STRIDE + columns)
    mask = (start + rows < T) & (columns < D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def row_of(statistic, head, start, T, ROWS: tl.constexpr):
    """Pointers to start, start + 1, … of one head of lse or delta -> (ROWS,)."""
    padded = tl.cdiv(T, PAD) * PAD
    return statistic + tl.cast(head, tl.int64) * padded + start + tl.arange(0, ROWS)


@triton.jit
def keys_of(doc_start, first, T, BM: tl.constexpr, BN: tl.constexpr):
    """The walk of queries first, …, first + BM - 1: keys low to high, without a mask up to full."""
    low, high = tl.load(doc_start + first), tl.minimum(first + BM, T)
    one_document = tl.load(doc_start + high - 1) == low
    full = tl.where(one_document, low + (first - low) // BN * BN, low)  # tiles left of `first`
    return low, full, high


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, v, out, lse, doc_start, T,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (T, H, D) and lse of one tile of queries of one head."""
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest walks start first
    head, kv_head = tl.program_id(1), tl.program_id(1) // (H // Hk)
    i = first + tl.arange(0, BM)
    start_i = tl.load(doc_start + tl.minimum(i, T - 1))  # (BM,)
    q_i = load_tile(q + head * D, first, T, H * D, D, BM)  # (BM, D)
    m = tl.full((BM,), LOW, tl.float32)
    l = tl.zeros((BM,), tl.float32)  # noqa: E741
    a = tl.zeros((BM, q_i.shape[1]), tl.float32)
    low, full, high = keys_of(doc_start, first, T, BM, BN)
    for MASKED in tl.static_range(2):
        begin, end = (full, high) if MASKED else (low, full)
        for j0 in tl.range(begin, end, BN):
            k_j = load_tile(k + kv_head * D, j0, T, Hk * D, D, BN)  # (BN, D)
            s = tl.dot(q_i, tl.trans(k_j), input_precision=DOT)  # (1), (BM, BN), not scaled yet
            if MASKED:
                j = j0 + tl.arange(0, BN)
                seen = (start_i[:, None] <= j[None, :]) & (j[None, :] <= i[:, None])
                s = tl.where(seen, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1) * SCALE)  # (2)
            r = tl.exp2(m - m_new)  # (2)
            p = tl.exp2(s * SCALE - m_new[:, None])  # of (3): one fused multiply-add, one exp2
            l = l * r + tl.sum(p, axis=1)  # (3)  # noqa: E741
            v_j = load_tile(v + kv_head * D, j0, T, Hk * D, D, BN)  # (BN, D)
            a = tl.dot(p.to(v_j.dtype), v_j, a * r[:, None], input_precision=DOT)  # (3)
            m = m_new
    store_tile(out + head * D, a / l[:, None], first, T, H * D, D)  # (1), (BM, D)
    tl.store(row_of(lse, head, first, T, BM), m + tl.log2(l))  # L_i, (BM,)


@triton.jit(do_not_specialize=["T"])
def backward_q_kernel(
    q, k, v, out, d_out, lse, delta, dq, doc_start, T,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq (T, H, D) and delta of one tile of queries of one head, on the forward kernel's walk."""
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, kv_head = tl.program_id(1), tl.program_id(1) // (H // Hk)
    i = first + tl.arange(0, BM)
    start_i = tl.load(doc_start + tl.minimum(i, T - 1))  # (BM,)
    q_i = load_tile(q + head * D, first, T, H * D, D, BM)  # (BM, D)
    o_i = load_tile(out + head * D, first, T, H * D, D, BM)  # (BM, D)
    do_i = load_tile(d_out + head * D, first, T, H * D, D, BM)  # (BM, D)
    lse_i = tl.load(row_of(lse, head, first, T, BM))  # (BM,)
    delta_i = tl.sum(o_i.to(tl.float32) * do_i.to(tl.float32), axis=1)  # (5)
    tl.store(row_of(delta, head, first, T, BM), delta_i)  # (BM,)
    dq_i = tl.zeros((BM, q_i.shape[1]), tl.float32)
    low, full, high = keys_of(doc_start, first, T, BM, BN)
    for MASKED in tl.static_range(2):
        begin, end = (full, high) if MASKED else (low, full)
        for j0 in tl.range(begin, end, BN):
            k_j = load_tile(k + kv_head * D, j0, T, Hk * D, D, BN)  # (BN, D)
            v_j = load_tile(v + kv_head * D, j0, T, Hk * D, D, BN)  # (BN, D)
            s = tl.dot(q_i, tl.trans(k_j), input_precision=DOT)  # (1), (BM, BN)
            p = tl.exp2(s * SCALE - lse_i[:, None])  # (1)
            if MASKED:
                j = j0 + tl.arange(0, BN)
                seen = (start_i[:, None] <= j[None, :]) & (j[None, :] <= i[:, None])
                p = tl.where(seen, p, 0.0)
            dp = tl.dot(do_i, tl.trans(v_j), input_precision=DOT)  # (4), (BM, BN)
            ds = p * (dp - delta_i[:, None])  # (5)
            dq_i = tl.dot(ds.to(k_j.dtype), k_j, dq_i, input_precision=DOT)  # (6)
    store_tile(dq + head * D, dq_i * D**-0.5, first, T, H * D, D)  # (6), (BM, D)


@triton.jit(do_not_specialize=["T"])
def backward_kv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, doc_end, T,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv (T, Hk, D) of one tile of keys, over the query tiles of all heads of its group.

    Scores are transposed, keys by queries: p and ds can then be left operands from registers.
    """
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    GROUP: tl.constexpr = H // Hk
    DIAGONAL: tl.constexpr = (BN + BM - 1) // BM  # tiles of queries that the diagonal crosses
    first, kv_head = tl.program_id(0) * BN, tl.program_id(1)
    j = first + tl.arange(0, BN)
    end_j = tl.load(doc_end + tl.minimum(j, T - 1))  # (BN,)
    k_j = load_tile(k + kv_head * D, first, T, Hk * D, D, BN)  # (BN, D)
    v_j = load_tile(v + kv_head * D, first, T, Hk * D, D, BN)  # (BN, D)
    dk_j = tl.zeros((BN, k_j.shape[1]), tl.float32)
    dv_j = tl.zeros((BN, k_j.shape[1]), tl.float32)
    # Tiles of queries, from `first` to the end of the last key's document: DIAGONAL tiles, then, if
    # all keys are of one document, `full` ones, then those in which a document ends.
    end = tl.load(doc_end + tl.minimum(first + BN, T) - 1)
    one_document = tl.load(doc_end + first) == end
    full = tl.where(one_document, tl.maximum(end - first - DIAGONAL * BM, 0) // BM, 0)
    for MASKED in tl.static_range(2):
        tiles = tl.cdiv(end - first, BM) - full if MASKED else full
        for step in tl.range(0, tiles * GROUP):  # one loop over tiles and heads pipelines both
            head, tile = kv_head * GROUP + step % GROUP, step // GROUP
            tile += tl.where(tile < DIAGONAL, 0, full) if MASKED else DIAGONAL
            i0 = first + tile * BM
            q_i = load_tile(q + head * D, i0, T, H * D, D, BM)  # (BM, D)
            lse_i = tl.load(row_of(lse, head, i0, T, BM))  # (BM,)
            s = tl.dot(k_j, tl.trans(q_i), input_precision=DOT)  # (1), (BN, BM)
            p = tl.exp2(s * SCALE - lse_i[None, :])  # (1)
            if MASKED:
                i = i0 + tl.arange(0, BM)
                seen = (j[:, None] <= i[None, :]) & (i[None, :] < end_j[:, None])
                p = tl.where(seen, p, 0.0)
            do_i = load_tile(d_out + head * D, i0, T, H * D, D, BM)  # (BM, D)
            dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision=DOT)  # (4)
            dp = tl.dot(v_j, tl.trans(do_i), input_precision=DOT)  # (4), (BN, BM)
            delta_i = tl.load(row_of(delta, head, i0, T, BM))  # (BM,)
            ds = p * (dp - delta_i[None, :])  # (5)
            dk_j = tl.dot(ds.to(q_i.dtype), q_i, dk_j, input_precision=DOT)  # (6)
    store_tile(dk + kv_head * D, dk_j * D**-0.5, first, T, Hk * D, D)  # (6), (BN, D)
    store_tile(dv + kv_head * D, dv_j, first, T, Hk * D, D)  # (BN, D)


def blocks(kernel, dtype, shared_memory):
    """Block sizes of a kernel: of those tried, the largest that spill no registers.

    shared_memory: bytes that the chip gives a block, 227 KiB on Hopper; the small sizes fit 99 KiB.
    tests/kernels/test_kernels_compiled.py compiles all of them, `bench.py tune` times others. fp32
    runs without tensor cores: it is there to check the others by.
    """
    if dtype == torch.float32:
        warps = 8 if kernel is backward_q_kernel else 4
        return {"BM": 16, "BN": 16, "num_warps": warps, "num_stages": 1}
    large = shared_memory >= 227 << 10
    BM, BN = {
        forward_kernel: (128, 128) if large else (128, 64),
        backward_q_kernel: (128, 64),
        backward_kv_kernel: (64, 128) if large else (32, 64),
    }[kernel]
    return {"BM": BM, "BN": BN, "num_warps": 8, "num_stages": 2}


def shared_memory(x):
    """Bytes of shared memory that a block may have on the GPU of x; 0 where Triton interprets."""
    gpu = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    return gpu.shared_memory_per_block_optin if gpu else 0


# Custom operators: torch.compile keeps each as one node of its graph; the fakes tell it the shapes.


@torch.library.custom_op("tulu::attention", mutates_args=())
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    doc_start: torch.Tensor, doc_end: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (T, H, D) and lse (H, T padded)."""
    (T, H, D), Hk = q.shape, k.shape[1]
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = fake_attention(q, k, v, doc_start, doc_end)
    size = blocks(forward_kernel, q.dtype, shared_memory(q))
    grid = triton.cdiv(T, size["BM"]), H
    forward_kernel[grid](q, k, v, out, lse, doc_start, T, H, Hk, D, **size)
    return out, lse


@attention_op.register_fake
def fake_attention(q, k, v, doc_start, doc_end):
    """Memory for out and, in fp32, for lse."""
    T, H = q.shape[:2]
    padded = (T + PAD.value - 1) // PAD.value * PAD.value
    return q.new_empty(q.shape), q.new_empty(H, padded, dtype=torch.float32)


@torch.library.custom_op("tulu::attention_backward", mutates_args=())
def attention_backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor,
    doc_end: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, d_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk and dv; the first kernel makes delta for the second."""
    (T, H, D), Hk = q.shape, k.shape[1]
    q, k, v, d_out = (x.contiguous() for x in (q, k, v, d_out))
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    size = blocks(backward_q_kernel, q.dtype, shared_memory(q))
    grid = triton.cdiv(T, size["BM"]), H
    backward_q_kernel[grid](q, k, v, out, d_out, lse, delta, dq, doc_start, T, H, Hk, D, **size)
    size = blocks(backward_kv_kernel, q.dtype, shared_memory(q))
    grid = triton.cdiv(T, size["BN"]), Hk
    backward_kv_kernel[grid](q, k, v, d_out, lse, delta, dk, dv, doc_end, T, H, Hk, D, **size)
    return dq, dk, dv


@attention_backward_op.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def attention_gradients(ctx, d_out, d_lse):
    """Of q, k and v; lse has no user but this backward, so no gradient d_lse."""
    return *attention_backward_op(*ctx.saved_tensors, d_out), None, None


attention_op.register_autograd(attention_gradients, setup_context=keep_for_backward)


def attention_triton(q, k, v, doc_start, doc_end=None, tiles=None):
    """`attention` by the kernels; CPU tensors too where Triton interprets (TRITON_INTERPRET=1)."""
    D = q.shape[2]
    assert D % 16 == 0 and 16 <= D <= 128, f"head size {D}, expected a multiple of 16 up to 128"
    doc_end = document_ends(doc_start) if doc_end is None else doc_end
    return attention_op(q, k, v, doc_start, doc_end)[0]
