"""Decoding NF4 beside what else decodes it: the part of `bench.py kernels` about kernels/nf4.py."""

import torch

from benchmarks import measure
from kernels import nf4


def bitsandbytes(state, dtype):
    """Its kernel, of the same bytes."""
    try:
        from bitsandbytes import functional
    except ImportError:
        raise measure.Unavailable("bitsandbytes is not installed") from None
    scales, shape = nf4.decode_scales(state), (len(state.codes), 2 * state.codes.shape[1])
    theirs = functional.QuantState(scales, shape, None, nf4.BLOCK, "nf4", dtype)
    return functional.dequantize_4bit(state.codes.view(-1, 1), theirs)


DECODERS = {"ours": nf4.dequantize, "torch": nf4.dequantize_reference, "bitsandbytes": bitsandbytes}


def time_nf4(provider, N, K, device, dtype):
    """Milliseconds of decoding a weight (N, K), and the TB/s read and written."""
    torch.manual_seed(0)
    state = nf4.quantize(torch.randn(N, K, device=device) * 0.02)
    ms = measure.milliseconds(lambda: provider(state, dtype), device)
    return {
        "ms": ms,
        "tb_per_s": (sum(x.nbytes for x in state) + N * K * dtype.itemsize) / ms / 1e9,
    }
