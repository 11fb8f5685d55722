"""kernels/decode_attention.py against its definition in fp64; on a GPU or interpreted."""

import math

import pytest
import torch

from kernels import decode_attention as module
from kernels.decode_attention import decode_attention, decode_reference, split_count, takes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]  # interpreter: no bf16

pytestmark = pytest.mark.kernel


def make_inputs(positions, H, Hk, D, dtype, room=200, seed=0):
    """q, k, v of the new tokens, and a cache that holds NaN wherever nothing was written."""
    generator = torch.Generator().manual_seed(seed)
    B = len(positions)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = random(B, H, D), random(B, Hk, D), random(B, Hk, D)
    keys, values = random(B + 2, Hk, room, D) * 2, random(B + 2, Hk, room, D)
    for b in range(B + 2):
        begin = positions[b] if b < B else 0
        keys[b, :, begin:], values[b, :, begin:] = math.nan, math.nan
    return [x.to(dtype) for x in (q, k, v, keys, values)]


def on_device(tensors):
    """q, k, v and the two caches as the kernel takes them."""
    return [x.to(DEVICE).flatten(1) if x.dim() == 4 else x.to(DEVICE) for x in tensors]


CASES = [(1, 6, 2, 48), (4, 6, 2, 48), (4, 2, 2, 16), (4, 8, 1, 128), (1, 34, 2, 32)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("splits, H, Hk, D", CASES)
def test_attention_of_a_new_token_is_that_of_the_definition(splits, H, Hk, D, dtype, monkeypatch):
    """For sequences of 0 to 199 earlier tokens, in any number of parts, whatever their group.

    Inputs are rounded first, so what differs from fp64 is the kernel's arithmetic. fp32: sums of
    200 terms of order one, each rounded at 6e-8, 1e-5 at most. 16 bits: p and the output are
    rounded once each, at 2^-11 (2^-8 in bf16), and |v| is under 5.
    """
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    positions = [0, 1, 64, 199]
    inputs = make_inputs(positions, H, Hk, D, dtype)
    q, k, v, keys, values = on_device(inputs)
    out = decode_attention(q, k, v, keys, values, torch.tensor(positions, device=DEVICE))
    expected = decode_reference(*(x.double() for x in inputs), torch.tensor(positions))
    rounding = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert out.dtype == dtype
    assert (out.double().cpu() - expected).abs().max() < 2 * 5 * rounding


@pytest.mark.parametrize("splits", [1, 8])
def test_the_new_token_is_put_into_the_cache_and_nothing_else(splits, monkeypatch):
    """Bit by bit: one row of each head of the first B slots; other slots and rows stay."""
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    positions = [3, 0, 70]
    q, k, v, keys, values = make_inputs(positions, 4, 2, 16, torch.float32)
    expected = keys.clone(), values.clone()
    for b, n in enumerate(positions):
        expected[0][b, :, n], expected[1][b, :, n] = k[b], v[b]
    q, k, v, keys, values = on_device((q, k, v, keys, values))
    decode_attention(q, k, v, keys, values, torch.tensor(positions, device=DEVICE))
    for found, wanted in zip((keys, values), expected, strict=True):
        bits = wanted.flatten(1).view(torch.int32)  # NaN, too
        assert torch.equal(found.cpu().view(torch.int32), bits)


def test_the_operator_is_what_its_declaration_says():
    """torch's own checks: shapes of the fake, and which arguments change."""
    inputs = on_device(make_inputs([3, 9], 4, 2, 16, torch.float32))
    positions = torch.tensor([3, 9], device=DEVICE)
    torch.library.opcheck(
        decode_attention, (*inputs, positions),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_parts_fill_the_chip_and_no_more():
    """Two programs a multiprocessor; powers of two, as the merge takes them; one where many are."""
    assert [split_count(n, 132) for n in (1, 8, 32, 256, 264, 8192)] == [32, 32, 16, 2, 1, 1]


def test_head_sizes():
    """Multiples of 16 up to 128, Llama 2's among them."""
    assert [D for D in range(260) if takes(D)] == list(range(16, 129, 16))
