"""NF4 with double quantisation: a frozen weight in 4.127 bits, decoded just before it is used.

Dettmers et al. 2023 (arXiv 2305.14314), section 3, bit for bit as bitsandbytes 0.50 computes it
(functional.py, backends/default/ops.py), so that its folders can be read and adapters exchanged.

A weight W (N, K) is cut, row after row, into blocks of 64. Of block b with values w:

    absmax_b = max |w|        code = the level of C nearest to w / absmax_b                     (1)

C are 16 levels from -1 to 1: quantiles of a normal distribution, made symmetric about an exact 0.
"Nearest" is by midpoints: the code is the number of midpoints of C strictly below w · (1/absmax_b),
computed in fp32 (the reciprocal first). Two codes make a byte, the first one in its high half.

The scales absmax_b are quantised again. Less their mean over the tensor, `offset`, they are cut
into blocks of 256, and with nested_c = max |absmax_b - offset| of block c, by (1) again,

    q_b = the level of S nearest to (absmax_b - offset) / nested_c                              (2)

S are 256 levels, denser towards 0: Dettmers et al. 2021 (arXiv 2110.02861), section 1.3. Decoding:

    scale_b = S[q_b] · nested_c + offset      w = C[code] · scale_b                             (3)

in fp32, each operation rounded (no fused multiply-add), and w rounded once to the wanted type.

Bytes per weight: 1/2 + 1/64 + 4/(64 · 256) = 0.516. To decode reads 0.52 and writes 2 bytes per
weight in bf16. A 7B's blocks are 16 GB a pass, 5 ms of an H100's time beside a second of matrix
products on a row of 16k tokens: so decoding and multiplying stay apart. (A fused kernel decodes a
tile again for each tile of tokens; it wins where tokens are few, in generation.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK, NESTED_BLOCK = 64, 256  # weights to a scale, scales to a nested scale

# C (appendix E of the paper).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

QUANTIZED_AT_ONCE = 1 << 24  # weights; fp32 copies and int32 codes of so many are in memory
KERNEL_BLOCKS, KERNEL_WARPS = 16, 4  # of a program: 1,024 weights, eight for each of its threads


class NF4(NamedTuple):
    """A quantised weight (N, K)."""

    codes: torch.Tensor  # (N, K / 2) uint8
    absmax: torch.Tensor  # (N · K / 64,) uint8: q of (2)
    nested: torch.Tensor  # (⌈N · K / 64 / 256⌉,) fp32
    offset: torch.Tensor  # () fp32


def quantize(weight: torch.Tensor) -> NF4:
    """The `NF4` of a weight (N, K), K a multiple of 64, of any floating type: (1) and (2)."""
    codes, absmax = quantize_blocks(weight)
    return NF4(codes, *quantize_scales(absmax))


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1): codes (N, K / 2) uint8, and absmax (N · K / 64,) in fp32.

    Some rows of a weight alone have the codes and scales that they have in the whole.
    """
    (N, K), levels = weight.shape, table(LEVELS, weight.device)
    assert K % BLOCK == 0, (K, BLOCK)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = torch.empty(N, K // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(N * K // BLOCK, device=weight.device)
    rows = max(1, QUANTIZED_AT_ONCE // K)
    for first in range(0, N, rows):
        blocks = weight[first : first + rows].float().reshape(-1, BLOCK)
        largest = blocks.abs().amax(1)
        code = torch.bucketize(scaled(blocks, largest), midpoints, out_int32=True).byte()
        codes[first : first + rows] = (code[:, ::2] << 4 | code[:, 1::2]).view(-1, K // 2)
        absmax[first * K // BLOCK :][: len(largest)] = largest
    return codes, absmax


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(2): q uint8 (n,), nested fp32 (⌈n / 256⌉,) and offset fp32 () of absmax fp32 (n,).

    The mean is torch's, and so the last bit of `offset` is the device's, as in bitsandbytes.
    """
    levels, offset = table(None, absmax.device), absmax.mean()
    padding = -len(absmax) % NESTED_BLOCK
    blocks = torch.nn.functional.pad(absmax - offset, (0, padding)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    q = torch.bucketize(scaled(blocks, nested), (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return q.byte().view(-1)[: len(absmax)], nested, offset


def scaled(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rows divided by their largest magnitude; a row of zeros stays zero."""
    return (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)


TABLES = {}


def table(levels: tuple[float, ...] | None, device: torch.device) -> torch.Tensor:
    """`levels`, or S where they are None, in fp32, kept on each device."""
    if (levels, device) not in TABLES:
        TABLES[levels, device] = torch.tensor(levels or scale_levels(), device=device)
    return TABLES[levels, device]


def scale_levels() -> list[float]:
    """S: of the decades from 1e-6 to 1, 1, 2, … 64 levels of either sign; 0; and 1."""
    positive = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((bounds[:-1] + bounds[1:]) / 2 * 10 ** (exponent - 6))
    positive = torch.cat(positive)
    return sorted((-positive).tolist() + [0.0, 1.0] + positive.tolist())


def dequantize(state: NF4, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (N, K) of an `NF4` in `dtype`, by (3); written to `out` where that is given."""
    if state.codes.is_cuda:
        return dequantize_triton(state, dtype, out)
    return dequantize_reference(state, dtype, out)


def dequantize_reference(
    state: NF4, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(3) in torch."""
    weight = decode_blocks(state.codes, decode_scales(state), dtype)
    return weight if out is None else out.copy_(weight)


def decode_scales(state: NF4) -> torch.Tensor:
    """scale_b of (3), fp32 (N · K / 64,)."""
    scales = table(None, state.absmax.device)[state.absmax.int()]
    return scales * state.nested.repeat_interleave(NESTED_BLOCK)[: len(scales)] + state.offset


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """w of (3), (N, K), from codes (N, K / 2) and the scales of just these rows."""
    levels = table(LEVELS, codes.device)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)  # of each byte
    weight = pairs.index_select(0, codes.flatten().int()).view(-1, BLOCK)
    return weight.mul_(scales[:, None]).to(dtype).view(len(codes), -1)


def dequantize_triton(
    state: NF4, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(3) by the kernel, on CPU tensors too where Triton interprets (TRITON_INTERPRET=1)."""
    N, half = state.codes.shape
    if out is None:
        out = torch.empty(N, 2 * half, dtype=dtype, device=state.codes.device)
    blocks = len(state.absmax)
    dequantize_kernel[(triton.cdiv(blocks, KERNEL_BLOCKS),)](
        state.codes, state.absmax, state.nested, state.offset,
        table(LEVELS, state.codes.device), table(None, state.codes.device), out, blocks,
        KERNEL_BLOCKS, num_warps=KERNEL_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def dequantize_kernel(codes, absmax, nested, offset, C, S, out, blocks, BLOCKS: tl.constexpr):
    """(3) of BLOCKS blocks of 64 weights; the tables C and S stay in the chip's nearest cache."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < blocks
    q = tl.load(absmax + block, mask=real, other=0).to(tl.int32)  # (BLOCKS,)
    scale = tl.load(S + q) * tl.load(nested + block // 256, mask=real, other=0.0)
    scale = scale + tl.load(offset)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(codes + byte, mask=real[:, None], other=0).to(tl.int32)  # (BLOCKS, 32)
    first = tl.load(C + (pair >> 4)) * scale[:, None]
    second = tl.load(C + (pair & 15)) * scale[:, None]
    weight = tl.interleave(first, second).to(out.dtype.element_ty)  # (BLOCKS, 64)
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, weight, mask=real[:, None])


def linear(x: torch.Tensor, state: NF4) -> torch.Tensor:
    """x Wᵀ (T, N) of x (T, K) and an `NF4`, differentiable in x; W is decoded, used and dropped."""
    return linear_op(x, *state, False)


BUFFERS = {}  # on a GPU: one decoded weight of each type, the largest so far


@torch.library.custom_op("tulu::nf4_linear", mutates_args=())
def linear_op(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, nested: torch.Tensor,
    offset: torch.Tensor, backward: bool,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ, or with `backward` x W.

    One opaque operation for decoding and multiplying: else torch.compile would see that the
    backward pass decodes the same weight again, and keep every decoded weight for it.
    """
    state, out = NF4(codes, absmax, nested, offset), None
    if x.is_cuda:
        size, key = 2 * codes.numel(), (x.device, x.dtype)
        if key not in BUFFERS or BUFFERS[key].numel() < size:
            BUFFERS[key] = None  # freed before the larger one is made
            BUFFERS[key] = x.new_empty(size)
        out = BUFFERS[key][:size].view(len(codes), -1)
    weight = dequantize(state, x.dtype, out)
    return x @ (weight if backward else weight.T)


@linear_op.register_fake
def _(x, codes, absmax, nested, offset, backward):
    return x.new_empty(len(x), 2 * codes.shape[1] if backward else len(codes))


def save_state(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, *state, _ = inputs
    ctx.save_for_backward(*state)


def linear_backward(ctx, d_out: torch.Tensor) -> tuple:
    return linear_op(d_out, *ctx.saved_tensors, True), None, None, None, None, None


linear_op.register_autograd(linear_backward, setup_context=save_state)
