"""Causal attention inside each document of a packed row: on CPU through torch, on CUDA in Triton.

Queries, keys and values of documents laid end to end go in, the heads' outputs come out. The query
heads of a group read their key/value head where it lies; nothing is repeated in memory. It follows
FlashAttention (Dao et al. 2022, arXiv 2205.14135) and FlashAttention-2 (Dao, arXiv 2307.08691).

Shapes: T tokens of the row, H query heads, Hk key/value heads (H a multiple of Hk), D head size.

Token i sees j if doc_start[i] <= j <= i < doc_end[j]: in a document, itself and all before it. In a
pair (prompt | chosen | rejected, the prompt once) doc_start is the pair's first token; doc_end is
the pair's end or, for chosen, chosen's own: so rejected does not see chosen. Its picture is below.

Forward. For query i of one head, over the keys j that it sees:

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
dv, and both make s and dp again: 7 n² D and 24 n D, but no sum needs atomics, and bits repeat.

Tiles begin where a document or an answer begins, so that no bit depends on where it lies. A pair (P
prompt, C chosen, R rejected) and a document A, one character a token, in tiles of 4:

    keys              PPPPPPCCCCCCRRRRRAAAAAA
    queries  0 to  3  DDDD                       F  full: every query sees every key, no mask
             4 to  5  FFFFDD                     D  up to the diagonal, with a mask
             6 to  9  FFFFDDDDDD                 what is blank is never read
            10 to 11  FFFFFFFFDDDD
            12 to 15  FFFFDD      DDDD
            16 to 16  FFFFFF      FFDDD
            17 to 20                   DDDD
            21 to 22                   FFFFDD

A tile of queries walks along its keys from left to right, and counts them as if the hole (chosen,
for rejected) were not there. For dk and dv a tile of keys walks downwards along its queries, from
itself to the last that sees it. kernels/attention_tiles.py lists the tiles, holes and block sizes.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_cpu import attention_cpu
from kernels.attention_tiles import TILE, attention_tiles, blocks


def attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor | None = None,
              tiles: Tensor | None = None) -> Tensor:  # fmt: skip
    """softmax(q kᵀ / sqrt(D)) v, where token i sees j with doc_start[i] <= j <= i < doc_end[j].

    q (T, H, D), k and v (T, Hk, D), doc_start and doc_end (T,) int32 -> out (T, H, D) in the dtype
    of q. The softmax is in fp32. Without doc_end documents end where the next begins. tiles:
    `attention_tiles` of both, made once a row; made here, for which a GPU waits, if it is None.
    """
    doc_end = document_ends(doc_start) if doc_end is None else doc_end
    if q.is_cuda:
        return attention_triton(q, k, v, doc_start, doc_end, tiles)
    return attention_cpu(q, k, v, doc_start, doc_end)


def document_ends(doc_start: Tensor) -> Tensor:
    """doc_end (T,) int32 of documents: a search of doc_start in itself, for which no GPU waits."""
    return torch.searchsorted(doc_start, doc_start, right=True, out_int32=True)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor,
                        doc_end: Tensor | None = None) -> Tensor:  # fmt: skip
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


# The kernels. A program has one tile of queries (or of keys) of one head, and alone makes its sums,
# in a fixed order. Its walk has two parts, F and D of the picture: one loop body, compiled without
# the mask and with it. The softmax is to base 2: s log2 e in place of s, exp2 of it, and so `lse`
# is log2 of (1)'s denominator. Rows beyond the end of a walk repeat the last one, and are masked or
# never stored: so no row is read that is not of the walk. (A mask of rows would spill registers.)

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x log2 e); the chip has exp2 only
LOW = tl.constexpr(-1e30)  # the maximum before any key: finite, because inf - inf is NaN
DOT = tl.constexpr("ieee")  # fp32 inputs are multiplied in fp32, not in tf32
WHOLE = tl.constexpr(TILE)  # tokens of a tile in the list; of a program's, BM (or BN) of them


@triton.jit
def tile_of(tiles, role, BLOCK: tl.constexpr, HOLES: tl.constexpr):
    """The program's tile of queries (0) or of keys (1), or part of one: its first token and end."""
    PARTS: tl.constexpr = WHOLE // BLOCK  # some parts of a short tile are empty
    number = (role * tl.num_programs(0) + tl.program_id(0)) // PARTS
    tile = tiles + number * (4 + 2 * HOLES)
    first = tl.load(tile) + tl.program_id(0) % PARTS * BLOCK
    return tile, first, tl.minimum(first + BLOCK, tl.load(tile + 1))


@triton.jit
def keys_of(tile, first, HOLES: tl.constexpr):
    """What query `first` sees: where its keys begin, and how many are before it, less the holes."""
    low = tl.load(tile + 2)
    before = first - low
    for hole in tl.static_range(HOLES):
        before -= tl.load(tile + 5 + 2 * hole) - tl.load(tile + 4 + 2 * hole)
    return low, before


@triton.jit
def key_rows(tile, low, j0, keys, ROWS: tl.constexpr, MASKED: tl.constexpr, HOLES: tl.constexpr):
    """Keys number j0, j0 + 1, … of a walk over `keys` keys, in tokens after low + j0 (ROWS,)."""
    rows = tl.arange(0, ROWS)
    if MASKED:
        rows = tl.minimum(rows, keys - 1 - j0)
    for hole in tl.static_range(HOLES):
        begin, end = tl.load(tile + 4 + 2 * hole), tl.load(tile + 5 + 2 * hole)
        rows += tl.where(low + j0 + rows >= begin, end - begin, 0)
    return rows.to(tl.int64) if HOLES else rows


@triton.jit
def load_tile(base, start, rows, STRIDE: tl.constexpr, D: tl.constexpr):
    """Rows start + rows of a (T, D) matrix -> (ROWS, D rounded up to a power of 2).

    `start` is multiplied in 64 bits, `rows` in 32, unless it has 64 (it jumps over holes).
    """
    columns = tl.arange(0, triton.next_power_of_2(D))[None, :]
    pointers = base + tl.cast(start, tl.int64) * STRIDE + (rows[:, None] * STRIDE + columns)
    return tl.load(pointers, mask=columns < D, other=0.0)


@triton.jit
def store_tile(base, tile, start, end, STRIDE: tl.constexpr, D: tl.constexpr):
    """Write the rows up to `end` and the columns of a tile that exist."""
    rows = tl.arange(0, tile.shape[0])[:, None]
    columns = tl.arange(0, tile.shape[1])[None, :]
    pointers = base + tl.cast(start, tl.int64) * STRIDE + (rows * STRIDE + columns)
    mask = (start + rows < end) & (columns < D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, v, out, lse, tiles, T, HOLES: tl.constexpr,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (T, H, D) and lse (H, T) of one tile of queries of one head."""
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    head, kv_head = tl.program_id(1), tl.program_id(1) // (H // Hk)
    tile, first, end = tile_of(tiles, 0, BM, HOLES)
    if first >= end:
        return
    low, before = keys_of(tile, first, HOLES)
    rows = tl.arange(0, BM)
    q_i = load_tile(q + head * D, first, tl.minimum(rows, end - 1 - first), H * D, D)  # (BM, D)
    m = tl.full((BM,), LOW, tl.float32)
    l = tl.zeros((BM,), tl.float32)  # noqa: E741
    a = tl.zeros((BM, q_i.shape[1]), tl.float32)
    full, keys = before // BN * BN, before + end - first
    for MASKED in tl.static_range(2):
        for j0 in tl.range(full if MASKED else 0, keys if MASKED else full, BN):
            j = key_rows(tile, low, j0, keys, BN, MASKED, HOLES)
            k_j = load_tile(k + kv_head * D, low + j0, j, Hk * D, D)  # (BN, D)
            s = tl.dot(q_i, tl.trans(k_j), input_precision=DOT)  # (1), (BM, BN), not scaled yet
            if MASKED:
                seen = (j0 - before + tl.arange(0, BN))[None, :] <= rows[:, None]
                s = tl.where(seen, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1) * SCALE)  # (2)
            r = tl.exp2(m - m_new)  # (2)
            p = tl.exp2(s * SCALE - m_new[:, None])  # of (3): one fused multiply-add, one exp2
            l = l * r + tl.sum(p, axis=1)  # (3)  # noqa: E741
            v_j = load_tile(v + kv_head * D, low + j0, j, Hk * D, D)  # (BN, D)
            a = tl.dot(p.to(v_j.dtype), v_j, a * r[:, None], input_precision=DOT)  # (3)
            m = m_new
    store_tile(out + head * D, a / l[:, None], first, end, H * D, D)  # (1), (BM, D)
    of_rows = tl.cast(head, tl.int64) * T + first + rows
    tl.store(lse + of_rows, m + tl.log2(l), mask=first + rows < end)  # L_i, (BM,)


@triton.jit(do_not_specialize=["T"])
def backward_q_kernel(
    q, k, v, out, d_out, lse, delta, dq, tiles, T, HOLES: tl.constexpr,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq (T, H, D) and delta (H, T) of one tile of queries of one head, on the forward's walk."""
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    head, kv_head = tl.program_id(1), tl.program_id(1) // (H // Hk)
    tile, first, end = tile_of(tiles, 0, BM, HOLES)
    if first >= end:
        return
    low, before = keys_of(tile, first, HOLES)
    rows = tl.arange(0, BM)
    i = tl.minimum(rows, end - 1 - first)
    q_i = load_tile(q + head * D, first, i, H * D, D)  # (BM, D)
    o_i = load_tile(out + head * D, first, i, H * D, D)  # (BM, D)
    do_i = load_tile(d_out + head * D, first, i, H * D, D)  # (BM, D)
    lse_i = tl.load(lse + tl.cast(head, tl.int64) * T + first + i)  # (BM,)
    delta_i = tl.sum(o_i.to(tl.float32) * do_i.to(tl.float32), axis=1)  # (5)
    of_rows = tl.cast(head, tl.int64) * T + first + rows
    tl.store(delta + of_rows, delta_i, mask=first + rows < end)  # (BM,)
    dq_i = tl.zeros((BM, q_i.shape[1]), tl.float32)
    full, keys = before // BN * BN, before + end - first
    for MASKED in tl.static_range(2):
        for j0 in tl.range(full if MASKED else 0, keys if MASKED else full, BN):
            j = key_rows(tile, low, j0, keys, BN, MASKED, HOLES)
            k_j = load_tile(k + kv_head * D, low + j0, j, Hk * D, D)  # (BN, D)
            v_j = load_tile(v + kv_head * D, low + j0, j, Hk * D, D)  # (BN, D)
            s = tl.dot(q_i, tl.trans(k_j), input_precision=DOT)  # (1), (BM, BN)
            p = tl.exp2(s * SCALE - lse_i[:, None])  # (1)
            if MASKED:
                seen = (j0 - before + tl.arange(0, BN))[None, :] <= rows[:, None]
                p = tl.where(seen, p, 0.0)
            dp = tl.dot(do_i, tl.trans(v_j), input_precision=DOT)  # (4), (BM, BN)
            ds = p * (dp - delta_i[:, None])  # (5)
            dq_i = tl.dot(ds.to(k_j.dtype), k_j, dq_i, input_precision=DOT)  # (6)
    store_tile(dq + head * D, dq_i * D**-0.5, first, end, H * D, D)  # (6), (BM, D)


@triton.jit(do_not_specialize=["T"])
def backward_kv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, tiles, T, HOLES: tl.constexpr,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv (T, Hk, D) of one tile of keys, over the query tiles of all heads of its group.

    All that see them lie from the tile on up to their doc_end: here there are no holes. Scores are
    transposed, keys by queries: p and ds can then be left operands from registers.
    """
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    GROUP: tl.constexpr = H // Hk
    DIAGONAL: tl.constexpr = (BN + BM - 1) // BM  # tiles of queries that the diagonal crosses
    kv_head = tl.program_id(1)
    tile, first, end = tile_of(tiles, 1, BN, HOLES)
    if first >= end:
        return
    queries = tl.load(tile + 3) - first
    columns = tl.arange(0, BN)
    j = tl.minimum(columns, end - 1 - first)
    k_j = load_tile(k + kv_head * D, first, j, Hk * D, D)  # (BN, D)
    v_j = load_tile(v + kv_head * D, first, j, Hk * D, D)  # (BN, D)
    dk_j = tl.zeros((BN, k_j.shape[1]), tl.float32)
    dv_j = tl.zeros((BN, k_j.shape[1]), tl.float32)
    # DIAGONAL tiles of queries, then `full` ones, then one that ends where the queries do.
    full = tl.maximum(queries - DIAGONAL * BM, 0) // BM
    for MASKED in tl.static_range(2):
        count = tl.cdiv(queries, BM) - full if MASKED else full
        for step in tl.range(0, count * GROUP):  # one loop over tiles and heads pipelines both
            head, i0 = kv_head * GROUP + step % GROUP, step // GROUP
            i0 += tl.where(i0 < DIAGONAL, 0, full) if MASKED else DIAGONAL
            i0 *= BM
            i = tl.arange(0, BM)
            if MASKED:
                i = tl.minimum(i, queries - 1 - i0)
            of_rows = tl.cast(head, tl.int64) * T + first + i0 + i
            q_i = load_tile(q + head * D, first + i0, i, H * D, D)  # (BM, D)
            lse_i = tl.load(lse + of_rows)  # (BM,)
            s = tl.dot(k_j, tl.trans(q_i), input_precision=DOT)  # (1), (BN, BM)
            p = tl.exp2(s * SCALE - lse_i[None, :])  # (1)
            if MASKED:
                number = i0 + tl.arange(0, BM)[None, :]
                p = tl.where((columns[:, None] <= number) & (number < queries), p, 0.0)
            do_i = load_tile(d_out + head * D, first + i0, i, H * D, D)  # (BM, D)
            dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision=DOT)  # (4)
            dp = tl.dot(v_j, tl.trans(do_i), input_precision=DOT)  # (4), (BN, BM)
            delta_i = tl.load(delta + of_rows)  # (BM,)
            ds = p * (dp - delta_i[None, :])  # (5)
            dk_j = tl.dot(ds.to(q_i.dtype), q_i, dk_j, input_precision=DOT)  # (6)
    store_tile(dk + kv_head * D, dk_j * D**-0.5, first, end, Hk * D, D)  # (6), (BN, D)
    store_tile(dv + kv_head * D, dv_j, first, end, Hk * D, D)  # (BN, D)


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a block may have on the GPU of x; 0 where Triton interprets."""
    gpu = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    return gpu.shared_memory_per_block_optin if gpu else 0


def launch(name: str, q: Tensor, k: Tensor, tiles: Tensor) -> tuple[tuple, tuple, dict[str, int]]:
    """(grid, T and the constants, sizes) with which a kernel is called."""
    (T, H, D), Hk, (_, n, columns) = q.shape, k.shape[1], tiles.shape
    size = blocks(name, q.dtype, shared_memory(q))
    rows, heads = (size["BN"], Hk) if name == "backward_kv_kernel" else (size["BM"], H)
    return (n * (TILE // rows), heads), (T, (columns - 4) // 2, H, Hk, D), size


# Custom operators: torch.compile keeps each as one node of its graph; the fakes tell it the shapes.


@torch.library.custom_op("tulu::attention", mutates_args=())
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (T, H, D) and lse (H, T)."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = fake_attention(q, k, v, tiles)
    grid, shape, size = launch("forward_kernel", q, k, tiles)
    forward_kernel[grid](q, k, v, out, lse, tiles, *shape, **size)
    return out, lse


@attention_op.register_fake
def fake_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for out and, in fp32, for lse."""
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("tulu::attention_backward", mutates_args=())
def attention_backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, d_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk and dv; the first kernel makes delta for the second."""
    q, k, v, d_out = (x.contiguous() for x in (q, k, v, d_out))
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    grid, shape, size = launch("backward_q_kernel", q, k, tiles)
    backward_q_kernel[grid](q, k, v, out, d_out, lse, delta, dq, tiles, *shape, **size)
    grid, shape, size = launch("backward_kv_kernel", q, k, tiles)
    backward_kv_kernel[grid](q, k, v, d_out, lse, delta, dk, dv, tiles, *shape, **size)
    return dq, dk, dv


@attention_backward_op.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def attention_gradients(ctx, d_out: Tensor, d_lse: Tensor | None) -> tuple:
    """Of q, k and v; lse has no user but this backward, so no gradient d_lse."""
    return *attention_backward_op(*ctx.saved_tensors, d_out), None


attention_op.register_autograd(attention_gradients, setup_context=keep_for_backward)


def attention_triton(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor,
                     doc_end: Tensor | None = None,
                     tiles: Tensor | None = None) -> Tensor:  # fmt: skip
    """`attention` by the kernels; CPU tensors too where Triton interprets (TRITON_INTERPRET=1)."""
    D = q.shape[2]
    assert D % 16 == 0 and 16 <= D <= 128, f"head size {D}, expected a multiple of 16 up to 128"
    if tiles is None:
        tiles = tiles_on_device(doc_start, doc_end)
    return attention_op(q, k, v, tiles)[0]


@torch.compiler.disable  # NumPy
def tiles_on_device(doc_start: Tensor, doc_end: Tensor | None = None) -> Tensor:
    """`attention_tiles` of tensors, on their device; a GPU waits for the host."""
    doc_end = document_ends(doc_start) if doc_end is None else doc_end
    tiles = attention_tiles(doc_start.cpu().numpy(), doc_end.cpu().numpy())
    return torch.from_numpy(tiles).to(doc_start.device)
