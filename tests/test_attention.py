"""kernels/attention.py against its definition in fp64; the kernels in Triton's interpreter."""

import math

import pytest
import torch

from kernels.attention import (
    attention,
    attention_layout,
    attention_reference,
    attention_triton,
)

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
    assert attention_layout(doc_start).tolist() == lengths
    q, k, v, _ = make_inputs(lengths, 2, 1, 16, torch.float32)
    with_layout = attention(q, k, v, doc_start, attention_layout(doc_start))
    assert torch.equal(with_layout, attention(q, k, v, doc_start))


def test_empty_row():
    """A row of no tokens has an empty output and empty gradients."""
    inputs = [torch.zeros(0, heads, 16) for heads in (4, 2, 2, 4)]
    out, dq, dk, dv = run(attention, *inputs, torch.zeros(0, dtype=torch.int32))
    assert out.shape == dq.shape == (0, 4, 16) and dk.shape == dv.shape == (0, 2, 16)


def naive(q, k, v, doc_start):
    """The definition with every intermediate in the inputs' own type: how wrong one may be."""
    (T, H, D), Hk = q.shape, k.shape[1]
    i = torch.arange(T)
    seen = (doc_start[:, None] <= i) & (i <= i[:, None])
    k, v = (x.repeat_interleave(H // Hk, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def assert_as_exact_as_naive(function, inputs, doc_start):
    """No result of function is further from fp64 than four times the naive one in the same type.

    An exponent is rounded three times here (to base 2, lse, their difference) where naively it is
    once, and sums have another order; and a floor of two roundings of the largest value of all
    results, for where the naive one happens to be exact (documents of one token).
    """
    dtype = inputs[0].dtype
    exact = run(attention_reference, *(x.double() for x in inputs), doc_start)
    same_type = run(naive, *inputs, doc_start)
    ours = run(function, *inputs, doc_start)
    floor = 2 * torch.finfo(dtype).eps * max(e.abs().max() for e in exact)
    for name, e, n, o in zip(("out", "dq", "dk", "dv"), exact, same_type, ours, strict=True):
        assert o.dtype == dtype and o.shape == e.shape
        allowed = 4 * (n.double() - e).abs().max() + floor
        error = (o.double() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# Tiles are 32 to 128 tokens: edges of documents at, inside and across those of tiles.
TILES = [[128, 64, 1, 70, 2], [145], [3] * 45]


@pytest.mark.parametrize("lengths", ROWS + TILES, ids=lambda row: f"{len(row)}x{row[0]}")
def test_kernels_in_fp16_on_every_kind_of_row(lengths):
    """Forward and every gradient."""
    inputs = make_inputs(lengths, 2, 1, 16, torch.float16)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


@pytest.mark.parametrize("lengths", [[33, 64, 1, 2], [100], [3] * 15], ids=str)
def test_kernels_in_fp32_on_every_kind_of_row(lengths):
    """Forward and every gradient, in tiles of 32."""
    inputs = make_inputs(lengths, 2, 1, 16, torch.float32)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", range(16, 129, 16))
def test_kernels_for_every_head_size(D, dtype):
    """Also those that are no power of 2, whose tiles are wider than they are."""
    lengths = [37, 1, 9]
    inputs = make_inputs(lengths, 1, 1, D, dtype)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


@pytest.mark.parametrize("H, Hk", [(2, 2), (4, 2), (8, 1)])
def test_kernels_for_grouped_heads(H, Hk):
    """dk and dv are sums over the query heads of a group."""
    lengths = [37, 64, 5]
    inputs = make_inputs(lengths, H, Hk, 16, torch.float16)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


def test_kernels_on_an_empty_row():
    """No tokens, no launch, empty gradients."""
    inputs = [torch.zeros(0, heads, 16) for heads in (4, 2, 2, 4)]
    out, dq, dk, dv = run(attention_triton, *inputs, torch.zeros(0, dtype=torch.int32))
    assert out.shape == dq.shape == (0, 4, 16) and dk.shape == dv.shape == (0, 2, 16)


def test_documents_do_not_touch_each_other():
    """Tiles outside a document are never read: even masked, a NaN there would spread as 0 · NaN."""
    lengths = [128, 128, 40]  # the largest tile is 128
    q, k, v, d_out = make_inputs(lengths, 1, 1, 16, torch.float16)
    for x in (q, k, v):
        x[128:256] = math.nan
    for result in run(attention_triton, q, k, v, d_out, doc_start_of(lengths)):
        assert result[:128].isfinite().all() and result[256:].isfinite().all()


def test_operators_have_shapes_and_gradients_for_the_compiler():
    """torch's own checks of a custom operator: schema, fake outputs, autograd registration."""
    lengths = [5, 3]
    q, k, v, _ = (x.requires_grad_() for x in make_inputs(lengths, 2, 1, 16, torch.float32))
    doc_start = doc_start_of(lengths)
    doc_end = torch.searchsorted(doc_start, doc_start, right=True, out_int32=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (q, k, v, doc_start, doc_end)
    torch.library.opcheck(torch.ops.tulu.attention, arguments, test_utils=tests)


def test_torch_compile_takes_them_whole():
    """No graph break, and the same numbers as eagerly."""
    inputs, doc_start = make_inputs([5, 3], 2, 1, 16, torch.float32), doc_start_of([5, 3])
    compiled = torch.compile(attention_triton, backend="aot_eager", fullgraph=True, dynamic=True)
    eager = run(attention_triton, *inputs, doc_start)
    for a, b in zip(run(compiled, *inputs, doc_start), eager, strict=True):
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
def test_on_a_gpu_compiled():
    """torch.compile makes one graph for rows of any documents, with the numbers of eager mode."""
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for lengths in ([100, 156], [256], [1, 255]):
        inputs = [x.cuda() for x in make_inputs(lengths, 4, 2, 64, torch.bfloat16)]
        doc_start = doc_start_of(lengths).cuda()
        layout = attention_layout(doc_start)
        eager = run(attention, *inputs, doc_start, layout)
        for a, b in zip(run(compiled, *inputs, doc_start, layout), eager, strict=True):
            assert torch.equal(a, b)


@gpu
def test_on_a_gpu_without_waiting():
    """Neither the layout nor a layer asks the GPU for a value."""
    inputs = [x.cuda() for x in make_inputs([100, 156], 4, 2, 64, torch.bfloat16)]
    doc_start = doc_start_of([100, 156]).cuda()
    run(attention, *inputs, doc_start)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attention, *inputs, doc_start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
