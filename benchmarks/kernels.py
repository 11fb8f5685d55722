"""Attention and the loss beside what else computes them: `python bench.py kernels [--toy]`.

Attention on rows of 16k tokens: documents of equal length (dense), and of chat-like lengths with a
mean of 490 and of 1,097 (the paper's figure for the Tulu V2 mixture). The loss at 7B's width.
Inputs are random: zeros run about 13 % faster. Times of a kernel that is missing are not guessed:
the reason is printed and stored.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import (
    attention_flops,
    cross_entropy_flops,
    doc_start_of,
    milliseconds,
    packed_lengths,
    write,
)
from kernels.attention import attention, attention_layout
from kernels.cross_entropy import linear_cross_entropy


class Unavailable(Exception):
    """This machine or installation lacks the provider; the text says why."""


def ours(q, k, v, lengths):
    """kernels/attention.py."""
    doc_start = doc_start_of(lengths, q.device)
    layout = attention_layout(doc_start)
    return lambda: attention(q, k, v, doc_start, layout), (q, k, v)


def sdpa(backend):
    """torch's scaled_dot_product_attention with one backend, documents padded to the longest."""

    def provider(q, k, v, lengths):
        if q.device.type != "cuda" and backend is not SDPBackend.MATH:
            raise Unavailable("needs a GPU")

        def pad(x):  # (documents, heads, longest, D)
            padded = torch.nn.utils.rnn.pad_sequence(x.detach().split(lengths), batch_first=True)
            return padded.transpose(1, 2).contiguous().requires_grad_()

        q, k, v = pad(q), pad(k), pad(v)

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            call()
        except RuntimeError as error:
            raise Unavailable(str(error).splitlines()[0]) from None
        return call, (q, k, v)

    return provider


def varlen(q, k, v, lengths):
    """torch.nn.attention.varlen (FlashAttention-2 in torch 2.13)."""
    if q.device.type != "cuda":
        raise Unavailable("needs a GPU")
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
    most, gqa = max(lengths), q.shape[1] != k.shape[1]

    def call():
        window = (-1, 0)  # causal
        return varlen_attn(q, k, v, ends, ends, most, most, window_size=window, enable_gqa=gqa)

    try:
        call()
    except (RuntimeError, TypeError) as error:
        raise Unavailable(str(error).splitlines()[0]) from None
    return call, (q, k, v)


def flex(q, k, v, lengths):
    """FlexAttention, compiled, with a mask of documents."""
    if q.device.type != "cuda":
        raise Unavailable("needs a GPU")
    if len(set(lengths)) == 1 and lengths[0] != 8192:
        raise Unavailable("compiles for every shape; measured on packed rows and at 8192 only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    doc_start = doc_start_of(lengths, q.device)

    def seen(batch, head, i, j):
        return (doc_start[i] <= j) & (j <= i)

    mask = create_block_mask(seen, None, None, len(q), len(q), device=q.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)
    x = [t.detach().transpose(0, 1)[None].contiguous().requires_grad_() for t in (q, k, v)]
    return lambda: compiled(*x, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]), x


ATTENTION = {
    "ours": ours,
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "varlen": varlen,
    "flex": flex,
}


def attention_cases(toy):
    """(name, lengths of the documents, H, Hk, D)."""
    if toy:
        rows = {"dense 32": [32] * 4, "packed 20": packed_lengths(20, 128)}
        return [(name, lengths, 4, 2, 32) for name, lengths in rows.items()]
    rows = {f"dense {n}": [n] * (16384 // n) for n in (512, 1024, 2048, 4096, 8192, 16384)}
    rows |= {f"packed {mean}": packed_lengths(mean, 16384) for mean in (490, 1097)}
    shapes = [(32, Hk, D) for D in (128, 64) for Hk in (32, 8)]
    return [(name, lengths, *shape) for shape in shapes for name, lengths in rows.items()]


def time_attention(provider, lengths, H, Hk, D, device, dtype):
    """Milliseconds and TFLOP/s of forward, backward and both."""
    torch.manual_seed(0)
    T = sum(lengths)
    q, k, v = (
        torch.randn(T, heads, D, device=device, dtype=dtype).requires_grad_()
        for heads in (H, Hk, Hk)
    )
    call, inputs = provider(q, k, v, lengths)
    with torch.no_grad():
        forward = milliseconds(call, device)
    out = call()
    d_out = torch.randn_like(out)

    def backward():
        torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    def both():
        torch.autograd.grad(call(), inputs, d_out)

    ms = {
        "forward": forward,
        "backward": milliseconds(backward, device),
        "both": milliseconds(both, device),
    }
    flops = attention_flops(lengths, H, D)
    return {"ms": ms, "tflops": {name: flops[name] / t / 1e9 for name, t in ms.items()}}


def ours_uniform(hidden, weight, labels):
    """kernels/cross_entropy.py as SFT calls it: three products."""
    return linear_cross_entropy(hidden, weight, labels, uniform_gradient=True).sum()


def ours_any(hidden, weight, labels):
    """kernels/cross_entropy.py as DPO calls it: four products."""
    return linear_cross_entropy(hidden, weight, labels).sum()


def eager(hidden, weight, labels):
    """Logits in the weights' type, then the loss in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def torch_fused(hidden, weight, labels):
    """torch.nn.functional.linear_cross_entropy."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has none")
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def liger(hidden, weight, labels):
    """Liger's fused linear cross-entropy."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


LOSSES = {
    "ours, uniform": ours_uniform,
    "ours, any gradient": ours_any,
    "eager": eager,
    "torch": torch_fused,
    "liger": liger,
}


def time_products(hidden, weight, device):
    """The three matrix products alone, each over all tokens at once: what nothing can beat."""
    hidden, weight = hidden.detach(), weight.detach()
    d_logits = hidden @ weight.T

    def call():
        torch.mm(hidden, weight.T), torch.mm(d_logits, weight), torch.mm(d_logits.T, hidden)

    return milliseconds(call, device)


def time_loss(provider, hidden, weight, labels, device):
    """Milliseconds of forward and backward, TFLOP/s by three products, and peak memory beside it.

    The peak is what is held beyond the inputs, the two gradients included, in MiB.
    """

    def call():
        torch.autograd.grad(provider(hidden, weight, labels), (hidden, weight))

    call()
    result = {}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        result["gradients_mib"] = 2 * (hidden.numel() + weight.numel()) / 2**20
    ms = milliseconds(call, device)
    flops = cross_entropy_flops(*hidden.shape[:1], *weight.shape)
    return {"ms": ms, "tflops": flops / ms / 1e9} | result


def main(arguments):
    """Measure, print a line each, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="bench.py kernels", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to rehearse on CPU")
    parser.add_argument("--out", default="results/kernels.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        parser.error("there is no GPU here (rehearse with --toy)")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = {"attention": [], "cross_entropy": []}

    def note(kind, case, name, measure):
        try:
            result = measure()
        except (Unavailable, torch.OutOfMemoryError) as error:
            result = {"skipped": str(error).splitlines()[0]}
        rows[kind].append(case | {"provider": name} | result)
        print(*case.values(), name, result, flush=True)

    for row, lengths, H, Hk, D in attention_cases(options.toy):
        case = {"row": row, "H": H, "Hk": Hk, "D": D}
        for name, provider in ATTENTION.items():
            note("attention", case, name, lambda p=provider, s=(lengths, H, Hk, D): time_attention(
                p, *s, device, dtype))  # fmt: skip

    E, V = (32, 101) if options.toy else (4096, 32000)
    for N in (16, 64) if options.toy else (2048, 4096, 8192, 16384, 32768):
        torch.manual_seed(0)
        hidden = torch.randn(N, E, device=device, dtype=dtype).requires_grad_()
        weight = (torch.randn(V, E, device=device, dtype=dtype) / E**0.5).requires_grad_()
        labels = torch.randint(V, (N,), device=device)
        case = {"N": N, "E": E, "V": V}
        tensors = (hidden, weight, labels)
        note("cross_entropy", case, "three products", lambda t=tensors: {
            "ms": time_products(*t[:2], device)})  # fmt: skip
        for name, provider in LOSSES.items():
            note("cross_entropy", case, name, lambda p=provider, t=tensors: time_loss(
                p, *t, device))  # fmt: skip
    command = " ".join(["python bench.py kernels", *arguments])
    write(options.out, command, device, dtype=str(dtype), toy=options.toy, **rows)
