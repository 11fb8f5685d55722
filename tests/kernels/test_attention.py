"""kernels/attention.py against its definition in fp64; the kernels on a GPU or interpreted."""

import math
import re

import pytest
import torch
import triton
import triton.language as tl

import kernels.attention
import kernels.attention_tiles
from kernels.attention import (
    TILE,
    attention,
    attention_reference,
    attention_triton,
    document_ends,
    key_rows,
    keys_of,
    tile_of,
    tiles_on_device,
)
from trees import PAIRS, row_of, row_of_documents, seen, tokens_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")  # of the kernels
SIXTEEN = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # the interpreter lacks bf16

# Lengths of the documents of a row: odd ones, of one token, one alone, many tiny ones.
ROWS = [[37], [1], [1, 1, 5, 1], [7, 101, 1, 37], [3] * 9]


def doc_start_of(lengths):
    """doc_start (T,) int32 of documents laid end to end."""
    return row_of_documents(lengths)[0]


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


TREES = {f"{len(row)}x{row[0]}": [(n,) for n in row] for row in ROWS} | PAIRS


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES)
@pytest.mark.parametrize("H, Hk", [(4, 4), (4, 2), (8, 1)])
def test_attention_on_cpu_equals_the_definition(trees, H, Hk):
    """Output and every gradient, per document and tree, for grouped heads, in fp64 to rounding."""
    row = row_of(*trees)
    inputs = make_inputs([len(row[0])], H, Hk, 16, torch.float64)
    for a, b in zip(
        run(attention, *inputs, *row), run(attention_reference, *inputs, *row), strict=True
    ):
        # fp64 rounds at 1e-16; scores reach about 50, sums run over at most 300 tokens.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_pair_equals_two_whole_documents():
    """By the definition: outputs, and gradients of which the two prompts' are added."""
    P, C, R = 11, 7, 5
    T, row = P + C + R, row_of((P, (C,), (R,)))
    inputs = make_inputs([T], 4, 2, 16, torch.float64)
    out, *gradients = run(attention_reference, *inputs, *row)
    prompt, chosen, rejected = torch.arange(T).split([P, C, R])
    where = torch.cat((prompt, chosen, prompt, rejected))
    *qkv, d_out = (x[where] for x in inputs)
    d_out[P + C : P + C + P] = 0  # the prompt's outputs count once
    twice, *gradients_twice = run(attention_reference, *qkv, d_out, doc_start_of([P + C, P + R]))
    torch.testing.assert_close(out[where], twice, rtol=1e-12, atol=1e-13)
    for once, parts in zip(gradients, gradients_twice, strict=True):
        added = torch.zeros_like(once).index_add_(0, where, parts)
        torch.testing.assert_close(once, added, rtol=1e-12, atol=1e-13)


def test_document_ends_made_once_change_nothing():
    """doc_end made once per row is what `attention` would make itself."""
    doc_start = doc_start_of([5, 1, 9])
    assert document_ends(doc_start).tolist() == [5] * 5 + [6] + [15] * 9
    q, k, v, _ = make_inputs([5, 1, 9], 2, 1, 16, torch.float32)
    with_ends = attention(q, k, v, doc_start, document_ends(doc_start))
    assert torch.equal(with_ends, attention(q, k, v, doc_start))


def naive(q, k, v, doc_start, doc_end=None):
    """The definition with every intermediate in the inputs' own type: how wrong one may be."""
    (_, H, D), Hk = q.shape, k.shape[1]
    mask = seen(doc_start, document_ends(doc_start) if doc_end is None else doc_end)
    k, v = (x.repeat_interleave(H // Hk, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


def assert_as_exact_as_naive(function, inputs, *row):
    """The error against fp64 is at most four times the naive one's in the same type, plus a floor.

    Four times: an exponent is rounded three times here (to base 2, lse, their difference) and once
    in the naive form, and sums have another order. The floor, two roundings of the largest value of
    all results, is for where the naive form happens to be exact (documents of one token).
    """
    dtype = inputs[0].dtype
    exact = run(attention_reference, *(x.double() for x in inputs), *row)
    same_type = run(naive, *inputs, *row)
    ours = run(function, *(x.to(DEVICE) for x in (*inputs, *row)))
    floor = 2 * torch.finfo(dtype).eps * max(e.abs().max() for e in exact)
    for name, e, n, o in zip(("out", "dq", "dk", "dv"), exact, same_type, ours, strict=True):
        assert o.dtype == dtype and o.shape == e.shape
        allowed = 4 * (n.double() - e).abs().max() + floor
        error = (o.double().cpu() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


kernel = pytest.mark.kernel
# Tiles are 16 to 128 tokens: edges of documents at, inside and across those of tiles.
TILES = [[128, 64, 1, 70, 2], [145], [3] * 17]


@kernel
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("lengths", ROWS + TILES, ids=lambda row: f"{len(row)}x{row[0]}")
def test_kernels_in_16_bits_on_every_kind_of_row(lengths, dtype):
    """Forward and every gradient."""
    inputs = make_inputs(lengths, 2, 1, 16, dtype)
    assert_as_exact_as_naive(attention_triton, inputs, doc_start_of(lengths))


@kernel
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("trees", PAIRS.values(), ids=PAIRS)
def test_kernels_on_pairs_and_deeper_trees(trees, dtype):
    """Forward and every gradient, for grouped heads."""
    row = row_of(*trees)
    inputs = make_inputs([len(row[0])], 2, 1, 16, dtype)
    assert_as_exact_as_naive(attention_triton, inputs, *row)


@kernel
@pytest.mark.parametrize(
    "trees", [[(17,), (32,), (1,)], [(60,)], [(3,)] * 8, [(20, (5, (3,), (4,)), (17,))]], ids=str
)
def test_kernels_in_fp32_on_every_kind_of_row(trees):
    """Forward and every gradient, in tiles of 16."""
    row = row_of(*trees)
    inputs = make_inputs([len(row[0])], 2, 1, 16, torch.float32)
    assert_as_exact_as_naive(attention_triton, inputs, *row)


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
    T, D = 7, 64
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
def walk_kernel(tiles, visits, T, HOLES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """visits (n, T) of each tile of queries: 1 at keys without a mask, 2 at keys with one."""
    tile, first, end = tile_of(tiles, 0, BM, HOLES)
    if first >= end:
        return
    low, before = keys_of(tile, first, HOLES)
    full, keys = before // BN * BN, before + end - first
    for MASKED in tl.static_range(2):
        for j0 in tl.range(full if MASKED else 0, keys if MASKED else full, BN):
            rows = key_rows(tile, low, j0, keys, BN, MASKED, HOLES)
            tl.store(visits + tl.program_id(0) * T + low + j0 + rows, 1 + MASKED)


def walks(doc_start, doc_end, BM, BN):
    """(first, end, visits (T,)) of every tile of queries."""
    tiles, T = tiles_on_device(doc_start.to(DEVICE), doc_end.to(DEVICE)), len(doc_start)
    parts = TILE // BM
    visits = torch.zeros(tiles.shape[1] * parts, T, dtype=torch.int32, device=DEVICE)
    walk_kernel[(len(visits),)](tiles, visits, T, (tiles.shape[2] - 4) // 2, BM, BN)
    for number, visited in enumerate(visits.cpu()):
        begin, end = tiles[0, number // parts, :2].tolist()
        first = begin + number % parts * BM
        if first < end:
            yield first, min(first + BM, end), visited


@kernel
@pytest.mark.parametrize("trees", [*PAIRS.values(), [(900,)], [(7,)] * 30], ids=str)
@pytest.mark.parametrize("BM, BN", [(128, 64), (128, 128), (16, 32)])
def test_a_walk_visits_what_is_seen_and_masks_only_its_end(trees, BM, BN):
    """Keys that no query of the tile sees are never visited, and those without a mask all see.

    So the cost is that of what is seen, and only tiles at the diagonal have a mask.
    """
    doc_start, doc_end = row_of(*trees)
    rows = seen(doc_start, doc_end)
    for first, end, visited in walks(doc_start, doc_end, BM, BN):
        assert torch.equal(rows[first:end].any(dim=0), visited > 0)
        assert rows[first:end, visited == 1].all()
        assert (visited == 2).sum() < BM + BN


@kernel
def test_the_picture_of_tiles_shows_the_walks(monkeypatch):
    """Each line of the module's picture has the keys that a tile visits, F without a mask."""
    monkeypatch.setattr(kernels.attention_tiles, "TILE", 4)
    picture = re.search(r"^ +keys +P.*?\n\n", kernels.attention.__doc__, re.M | re.S)[0]
    keys, *queries = picture.splitlines()[:-1]
    begin, row = keys.index("P"), keys.split()[1]
    P, C, R, A = map(row.count, "PCRA")
    drawn = {}
    for line in queries:
        tile = re.search(r"(\d+)(?:-| to) *(\d+)", line)
        drawn[int(tile[1]), int(tile[2]) + 1] = line[begin : begin + len(row)].ljust(len(row))
    walked = {
        (first, end): "".join(" FD"[visit] for visit in visited.tolist())
        for first, end, visited in walks(*row_of((P, (C,), (R,)), (A,)), BM=TILE, BN=4)
    }
    assert drawn == walked


def alone_and_in_a_row(function, tree, before, after, dtype, device):
    """Results of one tree alone, and in a row in which all else is NaN."""
    n, offset = tokens_of(tree), sum(map(tokens_of, before))
    inputs = make_inputs([n], 2, 1, 16, dtype)
    alone = run(function, *(x.to(device) for x in (*inputs, *row_of(tree))))
    row = row_of(*before, tree, *after)
    places = slice(offset, offset + n)
    in_row = []
    for x in inputs:
        wide = torch.full((len(row[0]), *x.shape[1:]), torch.nan, dtype=dtype)
        wide[places] = x
        in_row.append(wide)
    results = run(function, *(x.to(device) for x in (*in_row, *row)))
    return alone, [x[places] for x in results]


@pytest.mark.parametrize("tree", [(150,), (30, (50,), (130,))], ids=str)
@pytest.mark.parametrize("before", [[(3,)], [(70, (5,), (9,))]], ids=str)
@pytest.mark.parametrize("function", [attention, pytest.param(attention_triton, marks=kernel)])
def test_a_document_has_the_same_bits_alone_and_anywhere(function, tree, before):
    """Output and gradients of a document or a pair; nothing of its neighbours is ever read."""
    triton_ = function is attention_triton
    dtype = SIXTEEN[-1] if triton_ else torch.float32
    device = DEVICE if triton_ else "cpu"
    alone, in_row = alone_and_in_a_row(function, tree, before, [(9,)], dtype, device)
    for a, b in zip(alone, in_row, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [attention, pytest.param(attention_triton, marks=kernel)])
def test_rejected_does_not_read_chosen(function):
    """With NaN in chosen, rejected has the same results, and in tiles prompt the same output."""
    triton_ = function is attention_triton
    device = DEVICE if triton_ else "cpu"
    row = [x.to(device) for x in row_of((30, (50,), (40,)))]
    inputs = make_inputs([120], 2, 1, 16, torch.float16 if triton_ else torch.float32)
    inputs = [x.to(device) for x in inputs]
    poisoned = [x.clone() for x in inputs]
    for x in poisoned:
        x[30:80] = torch.nan
    clean, dirty = run(function, *inputs, *row), run(function, *poisoned, *row)
    if triton_:  # on CPU prompt and chosen are one call
        assert torch.equal(clean[0][:30], dirty[0][:30])
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[80:], b[80:])


@kernel
def test_operators_have_shapes_and_gradients_for_the_compiler():
    """torch's own checks of a custom operator: schema, fake outputs, autograd registration."""
    lengths = [5, 3]
    inputs = make_inputs(lengths, 2, 1, 16, torch.float32)
    q, k, v, _ = (x.to(DEVICE).requires_grad_() for x in inputs)
    doc_start = doc_start_of(lengths).to(DEVICE)
    arguments = q, k, v, tiles_on_device(doc_start)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tulu.attention, arguments, test_utils=tests)


@kernel
def test_torch_compile_takes_them_whole():
    """One graph for rows of any documents and pairs, with the numbers of eager mode."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(
        attention_triton, backend="inductor" if GPU else backend, fullgraph=True, dynamic=True
    )
    # torch compiles again for sizes of 1, and where two that were alike at first are so no more.
    for trees in ([(5,), (3,), (1,)], [(2,)] * 4, [(5, (3,), (4,))]):
        row = [x.to(DEVICE) for x in row_of(*trees)]
        inputs = [x.to(DEVICE) for x in make_inputs([len(row[0])], 2, 1, 16, torch.float16)]
        tiles = tiles_on_device(*row)
        eager = run(attention_triton, *inputs, *row, tiles)
        for a, b in zip(run(compiled, *inputs, *row, tiles), eager, strict=True):
            assert torch.equal(a, b)
    assert len(graphs) <= 1  # 0 with inductor


gpu = pytest.mark.gpu
REAL = {"long": [(4096,)], "490": [(490,)] * 8, "1097": [(1097,)] * 4, "tiny": [(3,)] * 300}
REAL |= {"mixed": [(1,), (2047,), (128,), (64,), (37,)], "pairs": [(185, (305,), (305,))] * 5}
REAL |= {"prompts": [(1000, (200,), (200,))] * 3, "deep": PAIRS["deep"] * 9}


@gpu
@pytest.mark.parametrize("trees", REAL.values(), ids=REAL)
@pytest.mark.parametrize("H, Hk, D", [(4, 4, 128), (8, 1, 64), (4, 2, 80)])
def test_on_a_gpu_in_bf16(trees, H, Hk, D):
    """The compiled kernels, forward and every gradient."""
    row = [x.cuda() for x in row_of(*trees)]
    inputs = [x.cuda() for x in make_inputs([len(row[0])], H, Hk, D, torch.bfloat16)]
    exact = run(attention_reference, *(x.double() for x in inputs), *row)
    # The reference has fp32 inside and rounds at its end only; the kernel rounds p and ds to bf16
    # (2^-9 each) before the products, like every fused kernel.
    for e, o in zip(exact, run(attention, *inputs, *row), strict=True):
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
    """With tiles made beforehand nothing asks the GPU for a value."""
    inputs = [x.cuda() for x in make_inputs([100, 156], 4, 2, 64, torch.bfloat16)]
    row = [x.cuda() for x in row_of_documents([100, 156])]
    row.append(tiles_on_device(*row))
    run(attention, *inputs, *row)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attention, *inputs, *row)
    finally:
        torch.cuda.set_sync_debug_mode("default")
