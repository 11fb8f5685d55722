"""nf4.py: bitsandbytes' bits, both ways; the kernel's are those of torch; what decoding keeps."""

import hashlib

import pytest
import torch

from kernels import nf4


def weight(N=300, K=192, scale=0.02):
    """(N, K) fp32 with a heavy tail, the same on every machine: integers, divided and cubed."""
    numbers = torch.arange(N * K, dtype=torch.int64) * 7919 % 10007 - 5003
    return ((numbers.double() / 5003) ** 3 * scale).float().view(N, K)


def normal(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def hashed(tensor):
    tensor = tensor.contiguous()
    return hashlib.sha256(bytes(tensor.view(torch.uint8).flatten().tolist())).hexdigest()[:16]


# Of `weight()`, by bitsandbytes 0.50.2: its implementation in torch ("default"), which follows its
# CUDA kernels. (Its library for CPUs finds the code of a scale by a table, and misses the nearest
# one where that is close.)
STORED = {
    "codes": "21c841ae50a44999",
    "absmax": "b0bacd151c4b74a1",
    "nested": "c8a685982d18c2f8",
    "offset": "84d109010e957609",
    "torch.float32": "5fa1f919cc539ad1",
    "torch.bfloat16": "5f7815df55efea60",
    "torch.float16": "8244ee07edccd5f1",
}

# The way to that implementation, past the library.
DEFAULT = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def test_bits_are_those_that_bitsandbytes_stored():
    """Codes, scales and decoded weights, of 900 blocks of 64 in four of 256, the last one short."""
    state = nf4.quantize(weight())
    ours = {name: hashed(getattr(state, name).reshape(-1)) for name in state._fields}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours[str(dtype)] = hashed(nf4.dequantize_reference(state, dtype))
    assert ours == STORED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_bitsandbytes_where_it_is_installed(dtype):
    """Of random and of degenerate weights; decoded by its library for the device, too."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    for N, K in ((7, 64), (37, 128), (300, 1024)):
        w = normal(N, K).to(dtype)
        w[0, :64] = 0
        w[1, 64 % K] = 1
        state = nf4.quantize(w)
        codes, quantized = theirs.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        assert torch.equal(codes.view(N, -1), state.codes)
        assert torch.equal(quantized.state2.absmax, state.nested)
        assert torch.equal(quantized.offset, state.offset)
        absmax = nf4.quantize_blocks(w)[1] - state.offset
        levels = theirs.create_dynamic_map()
        q, _ = torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(
            DEFAULT, absmax, levels, 256
        )
        assert torch.equal(q, state.absmax)
        quantized.absmax = q  # its library for CPUs has another level here and there: see STORED
        assert torch.equal(theirs.dequantize_4bit(codes, quantized), nf4.dequantize(state, dtype))


def test_quantising_what_was_decoded_changes_no_code():
    """Nor does it if what was decoded is rounded to bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        state = nf4.quantize(normal(64, 4096))
        again = nf4.quantize(nf4.dequantize(state, dtype))
        assert torch.equal(again.codes, state.codes)


def test_error_and_bytes_are_those_of_the_paper():
    """A Gaussian's relative error is 0.092; 4.127 bits a weight."""
    w = normal(256, 4096)
    state = nf4.quantize(w)
    error = (nf4.dequantize(state, torch.float32) - w).norm() / w.norm()
    assert error == pytest.approx(0.0921, abs=0.001)
    assert 8 * sum(part.nbytes for part in state) / w.numel() == pytest.approx(4.127, abs=0.001)


def test_rows_quantised_apart_have_the_codes_of_the_whole():
    """So that each rank may quantise its own; the scales' own quantisation needs all of them."""
    w = normal(37, 128)
    parts = [nf4.quantize_blocks(rows) for rows in w.split(10)]
    codes, absmax = nf4.quantize_blocks(w)
    assert torch.equal(torch.cat([part[0] for part in parts]), codes)
    assert torch.equal(torch.cat([part[1] for part in parts]), absmax)


def test_large_weights_are_quantised_in_parts(monkeypatch):
    """Whatever the size of a part."""
    whole = nf4.quantize(normal(37, 128))
    monkeypatch.setattr(nf4, "QUANTIZED_AT_ONCE", 1000)
    assert all(map(torch.equal, nf4.quantize(normal(37, 128)), whole))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernel_decodes_bit_for_bit_as_torch_does(dtype):
    """Of blocks that are no multiple of a program's, too, and into a buffer that is given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and dtype == "bfloat16":
        pytest.skip("Triton's interpreter rounds to bf16 wrongly")
    for N, K in ((7, 64), (37, 128), (300, 192)):
        state = nf4.NF4(*(part.to(device) for part in nf4.quantize(normal(N, K))))
        out = torch.full((N, K), torch.nan, dtype=getattr(torch, dtype), device=device)
        decoded = nf4.dequantize_triton(state, out.dtype, out)
        assert decoded.data_ptr() == out.data_ptr()
        assert torch.equal(out, nf4.dequantize_reference(state, out.dtype))


def test_a_product_and_its_gradient_are_those_of_the_decoded_weight():
    """x Wᵀ and dy W, bit for bit."""
    state = nf4.quantize(normal(37, 128))
    W = nf4.dequantize(state, torch.float32)
    x, d_out = normal(11, 128, 1).requires_grad_(), normal(11, 37, 2)
    out = nf4.linear(x, state)
    (d_x,) = torch.autograd.grad(out, x, d_out)
    assert torch.equal(out, x @ W.T)
    assert torch.equal(d_x, d_out @ W)
