"""kernels/attention.py against its definition in fp64; the kernels on a GPU or interpreted."""

import math
import re

import pytest
import torch
import triton
import triton.language as tl

import kernels.attention
from kernels.attention import (
    attention,
    attention_reference,
    attention_triton,
    backward_kv_kernel,
    blocks,
    document_ends,
    forward_kernel,
    keys_of,
    shared_memory,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")  # of the kernels
SIXTEEN = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # the interpreter lacks bf16

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


def test_document_ends_made_once_change_nothing():
    """doc_end made once per row is what `attention` would make itself."""
    doc_start = doc_start_of([5, 1, 9])
    assert document_ends(doc_start).tolist() == [5] * 5 + [6] + [15] * 9
    q, k, v, _ = make_inputs([5, 1, 9], 2, 1, 16, torch.float32)
    with_ends = attention(q, k, v, doc_start, document_ends(doc_start))
    assert torch.equal(with_ends, attention(q, k, v, doc_start))


def naive(q, k, v, doc_start):
    """The definition with every intermediate in the inputs' own type: how wrong one may be."""
    (T, H, D), Hk = q.shape, k.shape[1]
    i = torch.arange(T)
    seen = (doc_start[:, None] <= i) & (i <= i[:, None])
    k, v = (x.repeat_interleave(H // Hk, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def assert_as_exact_as_naive(function, inputs, doc_start):
    """The error against fp64 is at most four times the naive one's in the same type, plus a floor.

    Four times: an exponent is rounded three times here (to base 2, lse, their difference) and once
    in the naive form, and sums have another order. The floor, two roundings of the largest value of
    all results, is for where the naive form happens to be exact (documents of one token).
    """
    dtype = inputs[0].dtype
    exact = run(attention_reference, *(x.double() for x in inputs), doc_start)
    same_type = run(naive, *inputs, doc_start)
    ours = run(function, *(x.to(DEVICE) for x in inputs), doc_start.to(DEVICE))
    floor = 2 * torch.finfo(dtype).eps * max(e.abs().max() for e in exact)
    for name, e, n, o in zip(("out", "dq", "dk", "dv"), exact, same_type, ours, strict=True):
        assert o.dtype == dtype and o.shape == e.shape
        allowed = 4 * (n.double() - e).abs().max() + floor
        error = (o.double().cpu() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


kernel = pytest.mark.kernel
# Tiles are 16 to 128 tokens: edges of documents at, inside and across those of tiles.
TILES = [[128, 64, 1, 70, 2], [145], [3] * 45]


@kernel
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("lengths", ROWS + TILES, ids=lambda row: f"{len(row)}x{row[0]}")
def test_kernels_in_16_bits_on_every_kind_of_row(lengths, dtype):
    """Forward and every gradient."""
    inputs = make_inputs(lengths, 2, 1, 16, dtype)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


@kernel
@pytest.mark.parametrize("lengths", [[17, 32, 1, 2], [60], [3] * 8], ids=str)
def test_kernels_in_fp32_on_every_kind_of_row(lengths):
    """Forward and every gradient, in tiles of 16."""
    inputs = make_inputs(lengths, 2, 1, 16, torch.float32)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("D", range(16, 129, 16))
def test_kernels_for_every_head_size(D, dtype):
    """Also those that are not a power of 2, whose tiles are wider than the head."""
    inputs = make_inputs([37, 1, 9], 1, 1, D, dtype)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of([37, 1, 9]))


@kernel
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("H, Hk", [(2, 2), (4, 2), (8, 1)])
def test_kernels_for_grouped_heads(H, Hk, dtype):
    """dk and dv are sums over the query heads of a group."""
    inputs = make_inputs([37, 64, 5], H, Hk, 16, dtype)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of([37, 64, 5]))


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_where_there_is_nothing_to_choose_queries_and_keys_have_no_gradient(dtype):
    """In a document of one token o = v, and do·v - do·o is zero to fp32's rounding, not dtype's.

    The two products cancel wherever the values of a document are alike. If either were rounded to
    16 bits first, what was rounded off would be the gradient.
    """
    T, D = 37, 64
    inputs = *make_inputs([1] * T, 2, 1, D, dtype), doc_start_of([1] * T)
    q, k, v, d_out = (x.double() for x in inputs[:4])
    out, dq, dk, _ = run(attention_triton, *(x.to(DEVICE) for x in inputs))
    assert torch.equal(out.double().cpu(), v.expand(T, 2, D))
    # Two sums of D products in fp32, each off by at most D roundings of their sizes' sum.
    ds = 2 * D * 2**-24 * (d_out.abs() * v.abs()).sum(dim=2, keepdim=True)  # (T, H, 1)
    smallest = torch.finfo(dtype).smallest_normal  # under it fp16 rounds more coarsely
    assert (dq.double().cpu().abs() <= ds * k.abs() / D**0.5 + smallest).all()
    dk_allowed = (ds * q.abs()).sum(dim=1, keepdim=True) / D**0.5 + smallest
    assert (dk.double().cpu().abs() <= dk_allowed).all()


@kernel
def test_kernels_on_strided_inputs():
    """Slices of one projection's output, and an upstream gradient with heads first."""
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(42, 4, 3 * 16, generator=generator).half().to(DEVICE)
    d_out = torch.randn(4, 42, 16, generator=generator).half().to(DEVICE).transpose(0, 1)
    inputs = [*joined.split(16, dim=2), d_out]
    doc_start = doc_start_of([37, 5]).to(DEVICE)
    whole = run(attention_triton, *(x.contiguous() for x in inputs), doc_start)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attention_triton(q, k, v, doc_start)
    out.backward(d_out)
    for a, b in zip((out, q.grad, k.grad, v.grad), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [attention, pytest.param(attention_triton, marks=kernel)])
def test_empty_row(function):
    """A row of no tokens has an empty output and empty gradients."""
    device = DEVICE if function is attention_triton else "cpu"
    inputs = [torch.zeros(0, heads, 16, device=device) for heads in (4, 2, 2, 4)]
    doc_start = torch.zeros(0, dtype=torch.int32, device=device)
    out, dq, dk, dv = run(function, *inputs, doc_start)
    assert out.shape == dq.shape == (0, 4, 16) and dk.shape == dv.shape == (0, 2, 16)


@triton.jit
def walk_kernel(doc_start, walk, T, BM: tl.constexpr, BN: tl.constexpr):
    """(low, full, high) of `keys_of` for every tile of queries."""
    low, full, high = keys_of(doc_start, tl.program_id(0) * BM, T, BM, BN)
    tl.store(walk + 3 * tl.program_id(0), low)
    tl.store(walk + 3 * tl.program_id(0) + 1, full)
    tl.store(walk + 3 * tl.program_id(0) + 2, high)


@kernel
@pytest.mark.parametrize("lengths", [[900], [128, 256, 130], [5, 300, 1, 77, 450], [7] * 90])
@pytest.mark.parametrize("BM, BN", [(128, 64), (128, 128), (16, 32)])
def test_a_walk_covers_what_is_seen_and_masks_only_edges(lengths, BM, BN):
    """It spans the keys that some query of the tile sees; without a mask are those that all see.

    So the cost is that of the documents, and in a long one only the diagonal has a mask.
    """
    doc_start, T = doc_start_of(lengths), sum(lengths)
    walk = torch.zeros(triton.cdiv(T, BM), 3, dtype=torch.int32, device=DEVICE)
    walk_kernel[(len(walk),)](doc_start.to(DEVICE), walk, T, BM, BN)
    i = torch.arange(T)
    seen = (doc_start[:, None] <= i) & (i <= i[:, None])  # (T, T)
    for tile, (low, full, high) in enumerate(walk.tolist()):
        rows = seen[tile * BM : (tile + 1) * BM]
        assert rows.any(dim=0).nonzero().aminmax() == (low, high - 1)
        assert low <= full <= high and (full - low) % BN == 0
        assert rows[:, low:full].all()
        assert len(doc_start[tile * BM : high].unique()) > 1 or high - full < BM + BN


@kernel
def test_the_picture_of_tiles_shows_the_walks():
    """Each line of the module's picture spans the keys that `keys_of` gives, F without a mask."""
    picture = re.search(r"^ +keys +A.*?\n\n", kernels.attention.__doc__, re.M | re.S)[0]
    keys, *queries = picture.splitlines()[:-1]
    begin, row = keys.index("A"), keys.split()[1]
    doc_start = doc_start_of([row.count("A"), row.count("B")])
    walk = torch.zeros(len(queries), 3, dtype=torch.int32, device=DEVICE)
    walk_kernel[(len(walk),)](doc_start.to(DEVICE), walk, len(row), BM=4, BN=4)
    for line, (low, full, high), first in zip(
        queries, walk.tolist(), range(0, len(row), 4), strict=True
    ):
        last = min(first + 4, len(row)) - 1
        assert re.search(r"(\d+)- *(\d+)", line).groups() == (str(first), str(last))
        tiles = [(m.start() - begin, m[1]) for m in re.finditer(r"\[(\w) \]", line)]
        edge = doc_start[first] != doc_start[last]
        masked = "E" if edge else "D"
        assert tiles == [(j, "F" if j < full else masked) for j in range(low, high, 4)]


def poisoned(x, first, last):
    """x with NaN in all rows but first, …, last - 1."""
    rows = torch.arange(len(x))
    return x.masked_fill(((rows < first) | (rows >= last))[:, None, None], torch.nan)


@kernel
def test_no_tile_outside_a_document_is_read():
    """The tile at 128 stays finite with NaN, which spreads as 0 · NaN, all around its walk."""
    lengths, dtype, first = [100, 100, 30, 120], torch.float16, 128
    (q, k, v, d_out), doc_start = make_inputs(lengths, 1, 1, 16, dtype), doc_start_of(lengths)
    chip = shared_memory(q.to(DEVICE))
    size = blocks(forward_kernel, dtype, chip)
    low, high = 100, min(first + size["BM"], sum(lengths))
    last = low + triton.cdiv(high - low, size["BN"]) * size["BN"]
    row = q, poisoned(k, low, last), poisoned(v, low, last), d_out, doc_start
    out, dq, _, _ = run(attention_triton, *(x.to(DEVICE) for x in row))
    assert out[first:high].isfinite().all() and dq[first:high].isfinite().all()
    size = blocks(backward_kv_kernel, dtype, chip)
    high = first + size["BN"]
    end = 200 if high <= 200 else 350  # of the document of the last key
    last = first + triton.cdiv(end - first, size["BM"]) * size["BM"]
    row = poisoned(q, first, last), k, v, poisoned(d_out, first, last), doc_start
    _, _, dk, dv = run(attention_triton, *(x.to(DEVICE) for x in row))
    assert dk[first:high].isfinite().all() and dv[first:high].isfinite().all()


@kernel
def test_operators_have_shapes_and_gradients_for_the_compiler():
    """torch's own checks of a custom operator: schema, fake outputs, autograd registration."""
    lengths = [5, 3]
    inputs = make_inputs(lengths, 2, 1, 16, torch.float32)
    q, k, v, _ = (x.to(DEVICE).requires_grad_() for x in inputs)
    doc_start = doc_start_of(lengths).to(DEVICE)
    doc_end = document_ends(doc_start)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (q, k, v, doc_start, doc_end)
    torch.library.opcheck(torch.ops.tulu.attention, arguments, test_utils=tests)


@kernel
def test_torch_compile_takes_them_whole():
    """One graph for rows of any documents, with the numbers of eager mode."""
    backend = "inductor" if GPU else "aot_eager"
    compiled = torch.compile(attention_triton, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ([5, 3], [8], [1, 9]):
        inputs = [x.to(DEVICE) for x in make_inputs(lengths, 2, 1, 16, torch.float16)]
        doc_start = doc_start_of(lengths).to(DEVICE)
        doc_end = document_ends(doc_start)
        eager = run(attention_triton, *inputs, doc_start, doc_end)
        for a, b in zip(run(compiled, *inputs, doc_start, doc_end), eager, strict=True):
            assert torch.equal(a, b)


gpu = pytest.mark.gpu
REAL = [[4096], [490] * 8 + [176], [1097] * 4, [3] * 300, [1, 2047, 128, 64, 37]]


@gpu
@pytest.mark.parametrize("lengths", REAL, ids=lambda row: f"{len(row)}x{row[0]}")
@pytest.mark.parametrize("H, Hk, D", [(4, 4, 128), (8, 1, 64), (4, 2, 80)])
def test_on_a_gpu_in_bf16(lengths, H, Hk, D):
    """The compiled kernels, forward and every gradient."""
    inputs = [x.cuda() for x in make_inputs(lengths, H, Hk, D, torch.bfloat16)]
    doc_start = doc_start_of(lengths).cuda()
    exact = run(attention_reference, *(x.double() for x in inputs), doc_start)
    # The reference has fp32 inside and rounds at its end only; the kernel rounds p and ds to bf16
    # (2^-9 each) before the products, like every fused kernel.
    for e, o in zip(exact, run(attention, *inputs, doc_start), strict=True):
        error = (o.double() - e).norm() / e.norm()
        assert error < 3 * 2**-8, f"relative error {error:.1e}"


@gpu
def test_on_a_gpu_the_same_bits_every_time():
    """Deterministic, backward included."""
    lengths = [490] * 8 + [7]
    inputs = [x.cuda() for x in make_inputs(lengths, 8, 2, 128, torch.bfloat16)]
    doc_start = doc_start_of(lengths).cuda()
    first = run(attention, *inputs, doc_start)
    for _ in range(5):
        for a, b in zip(first, run(attention, *inputs, doc_start), strict=True):
            assert torch.equal(a, b)


@gpu
def test_on_a_gpu_without_waiting():
    """Neither `document_ends` nor a layer asks the GPU for a value."""
    inputs = [x.cuda() for x in make_inputs([100, 156], 4, 2, 64, torch.bfloat16)]
    doc_start = doc_start_of([100, 156]).cuda()
    run(attention, *inputs, doc_start)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attention, *inputs, doc_start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
