"""Attention of one new token of each sequence over the keys and values of those before it.

Decoding on a GPU repeats this call. It reads what is in the cache and nothing else, each key/value
head once for all query heads of its group, and puts the new token's key and value there.

Shapes: B sequences, sequence b in slot b; H query heads, Hk key/value heads, G = H / Hk; D head
size; S tokens that a slot has room for; n = positions[b] tokens before the new one.

One query sees n + 1 keys, and nothing is masked. The sums are (1) to (3) of kernels/attention.py,
their rows the G query heads of a group. For one sequence of 7B those are 32 programs, and an H100
has 132 multiprocessors: so the n keys are cut into SPLITS parts of equal length. Part s alone gives
its output o_s and its L_s = m_s + log l_s, and together (Dao et al. 2023, "Flash-Decoding"):

    o = Σ_s exp(L_s - L) o_s      L = log Σ_s exp(L_s)                                          (1)

which is exact, since exp(L_s) o_s is the part's numerator and exp(L_s) its denominator. The new
token, whose key need not be read back from the cache, is in part 0.

Bytes: 2 n Hk D elements a sequence, 16 KiB a token and layer of Llama 2 7B in bf16. A masked call
over the whole cache reads S in place of n, and one that repeats keys for their group G times that.
"""

import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x log2 e); the chip has exp2 only
LOW = tl.constexpr(-1e30)  # of a part without keys: finite, because inf - inf is NaN
DOT = tl.constexpr("ieee")  # fp32 inputs are multiplied in fp32, not in tf32
MOST_SPLITS = 32


def decode_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The same from the definition, one sequence after the other; the caches are not changed."""
    outs = []
    for b, n in enumerate(positions.tolist()):
        all_k = torch.cat((keys[b, :, :n], k[b, :, None]), dim=1)  # (Hk, n + 1, D)
        all_v = torch.cat((values[b, :, :n], v[b, :, None]), dim=1)
        grouped = q[b].unflatten(0, (len(all_k), -1))  # (Hk, G, D)
        p = (grouped @ all_k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        outs.append((p @ all_v).flatten(0, 1))
    return torch.stack(outs)


@triton.jit(do_not_specialize=["S"])
def decode_kernel(
    q, k, v, keys, values, positions, out, lse, S,
    H: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (B, H, SPLITS, D) and lse (B, H, SPLITS), to base 2, of one part of one group."""
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    G: tl.constexpr = H // Hk
    ROWS: tl.constexpr = triton.next_power_of_2(G) if G > 16 else 16  # tl.dot takes no fewer
    kv_head, split, b = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS, tl.program_id(1)
    n = tl.load(positions + b).to(tl.int32)
    length = tl.cdiv(tl.cdiv(n, SPLITS), BN) * BN
    end = tl.minimum((split + 1) * length, n)
    columns = tl.arange(0, triton.next_power_of_2(D))
    rows = tl.arange(0, ROWS)
    heads = b * H + kv_head * G + rows
    exist = (rows < G)[:, None] & (columns < D)[None, :]
    q_i = tl.load(q + heads[:, None] * D + columns, mask=exist, other=0.0)  # (ROWS, D)
    # The new token's key and value: part 0 begins with them, and puts them into the cache.
    new = (b * Hk + kv_head) * D + columns
    k_new = tl.load(k + new, mask=columns < D, other=0.0)  # (D,)
    v_new = tl.load(v + new, mask=columns < D, other=0.0)  # (D,)
    first = (tl.cast(b, tl.int64) * Hk + kv_head) * S  # of the slot's and head's rows in the cache
    tl.store(keys + (first + n) * D + columns, k_new, mask=(columns < D) & (split == 0))
    tl.store(values + (first + n) * D + columns, v_new, mask=(columns < D) & (split == 0))
    s_new = tl.sum(q_i.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1) * SCALE
    m = tl.where(split == 0, s_new, LOW)  # (ROWS,)
    l = tl.where(split == 0, 1.0, tl.zeros((ROWS,), tl.float32))  # noqa: E741
    a = l[:, None] * v_new.to(tl.float32)[None, :]  # (ROWS, D)
    for j0 in tl.range(split * length, end, BN):
        j = j0 + tl.arange(0, BN)
        inside = (j < end)[:, None] & (columns < D)[None, :]
        places = (first + j)[:, None] * D + columns
        k_j = tl.load(keys + places, mask=inside, other=0.0)  # (BN, D)
        s = tl.dot(q_i, tl.trans(k_j), input_precision=DOT) * SCALE
        s = tl.where((j < end)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        r = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * r + tl.sum(p, axis=1)  # noqa: E741
        v_j = tl.load(values + places, mask=inside, other=0.0)  # (BN, D)
        a = tl.dot(p.to(v_j.dtype), v_j, a * r[:, None], input_precision=DOT)
        m = m_new
    some = tl.where(l > 0, l, 1.0)  # a part without keys
    parts = heads * SPLITS + split
    a = (a / some[:, None]).to(out.dtype.element_ty)
    tl.store(out + tl.cast(parts, tl.int64)[:, None] * D + columns, a, mask=exist)
    tl.store(lse + parts, tl.where(l > 0, m + tl.log2(some), LOW), mask=rows < G)


@triton.jit
def merge_kernel(parts, lse, out, D: tl.constexpr, SPLITS: tl.constexpr):
    """out (B, H, D) of one query head, from its parts: (1)."""
    row, splits = tl.program_id(0), tl.program_id(0) * SPLITS + tl.arange(0, SPLITS)
    columns = tl.arange(0, triton.next_power_of_2(D))
    L = tl.load(lse + splits)  # (SPLITS,)
    w = tl.exp2(L - tl.max(L, axis=0))
    places = splits[:, None] * D + columns
    o = tl.load(parts + places, mask=(columns < D)[None, :], other=0.0)  # (SPLITS, D)
    o = tl.sum(w[:, None] * o, axis=0) / tl.sum(w, axis=0)
    tl.store(out + row * D + columns, o.to(out.dtype.element_ty), mask=columns < D)


def decode_blocks(dtype: torch.dtype, D: int) -> dict[str, int]:
    """Sizes of `decode_kernel`, by name: keys at a time, and Triton's options.

    What limits it is memory: three stages keep 2 times 32 KiB on their way for each program. Not
    tuned on a chip; TULU_COMPILE=all has tests/kernels/test_kernels_compiled.py compile all.
    """
    if dtype.itemsize == 4:  # runs without tensor cores: it is there to check the others by
        # On sm_90 heads above 64 spill with 32 keys at a time, and those of 32 with 16.
        return {"BN": 16 if D > 64 else 32, "num_warps": 8, "num_stages": 1}
    return {"BN": 64, "num_warps": 4, "num_stages": 3}


def split_count(programs: int, multiprocessors: int) -> int:
    """Parts of a sequence's keys, a power of two: two programs for each multiprocessor, or more."""
    wanted = -(-2 * multiprocessors // programs)
    return min(MOST_SPLITS, 1 << (wanted - 1).bit_length())


def takes(D: int) -> bool:
    """Whether the kernels, this one and kernels/attention.py's, take heads of D elements."""
    return D % 16 == 0 and 16 <= D <= 128


# A custom operator: torch.compile keeps it as one node, which changes keys and values in place.


@torch.library.custom_op("tulu::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """out (B, H, D) of the new tokens, whose keys and values are put into the cache.

    q (B, H, D), k and v (B, Hk, D) of the new tokens; keys and values (slots, Hk·S·D), in memory
    (slots, Hk, S, D), of which the first B slots are used; positions (B,) int64, each below S: the
    tokens before the new one.
    """
    (B, H, D), Hk = q.shape, k.shape[1]
    S = keys.shape[1] // (Hk * D)
    assert takes(D), f"head size {D}, expected a multiple of 16 up to 128"
    assert keys.is_contiguous() and values.is_contiguous(), (keys.stride(), values.stride())
    q, k, v = (x.contiguous() for x in (q, k, v))
    gpu = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    splits = split_count(B * Hk, gpu.multi_processor_count if gpu else 1)
    out, lse = torch.empty_like(q), q.new_empty(B, H, splits, dtype=torch.float32)
    parts = out if splits == 1 else q.new_empty(B, H, splits, D, dtype=torch.float32)
    decode_kernel[Hk * splits, B](
        q, k, v, keys, values, positions, parts, lse, S, H, Hk, D, splits,
        **decode_blocks(q.dtype, D),
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(B * H,)](parts, lse, out, D, splits)
    return out


@decode_attention.register_fake
def _(q, k, v, keys, values, positions):
    return q.new_empty(q.shape)
