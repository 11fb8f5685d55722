"""Attention, the loss and NF4 beside what else computes them: `python bench.py kernels [--toy]`.

Attention on rows of 16k tokens: documents of equal length (dense), and of chat-like lengths with a
mean of 490 and of 1,097 (the paper's figure for the Tulu V2 mixture), and pairs of answers to one
prompt, (prompt, chosen, rejected), beside the same pairs as whole documents. TFLOP/s count what is
seen, and a prompt once, however it is computed. The loss at 7B's width.
Inputs are random: zeros run about 13 % faster. Where another implementation is missing or fails, or
the time is over, the file says why instead of figures. The most telling cases come first. At the
end the tables of `bench.py table` are printed.
"""

import functools
import inspect
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import decoding, measure, table
from kernels.attention import attention, tiles_on_device
from kernels.cross_entropy import linear_cross_entropy
from program.flags import parse_args


def ours(q, k, v, lengths):
    """kernels/attention.py."""
    row = measure.doc_start_of(lengths, q.device), measure.doc_end_of(lengths, q.device)
    tiles = tiles_on_device(*row)
    return lambda: attention(q, k, v, *row, tiles), (q, k, v)


def ours_twice(q, k, v, lengths):
    """The same of pairs as two documents, each with the prompt."""
    pairs = measure.pairs_of(lengths)
    if not pairs:
        raise measure.Unavailable("a row without pairs")
    begins, where = itertools.accumulate(map(sum, pairs), initial=0), []
    for (prompt, chosen, rejected), begin in zip(pairs, begins, strict=False):
        split = begin + prompt + chosen
        where += [*range(begin, split), *range(begin, begin + prompt)]
        where += range(split, split + rejected)
    q, k, v = (x.detach()[torch.tensor(where)].requires_grad_() for x in (q, k, v))
    return ours(q, k, v, [prompt + n for prompt, *answers in pairs for n in answers])


def sdpa(backend):
    """torch's scaled_dot_product_attention with one backend, documents padded to the longest."""

    def provider(q, k, v, lengths):
        needs_gpu(q, lengths)

        def pad(x):  # (documents, heads, longest, D)
            padded = torch.nn.utils.rnn.pad_sequence(x.detach().split(lengths), batch_first=True)
            return padded.transpose(1, 2).contiguous().requires_grad_()

        q, k, v = pad(q), pad(k), pad(v)

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return call, (q, k, v)

    return provider


def varlen(q, k, v, lengths):
    """torch.nn.attention.varlen (FlashAttention-2 in torch 2.11 to 2.13)."""
    needs_gpu(q, lengths)
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
    options = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # not in torch 2.11
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    longest = max(lengths)
    return lambda: varlen_attn(q, k, v, ends, ends, longest, longest, **options), (q, k, v)


@functools.cache
def compiled_flex():
    """FlexAttention, compiled; it compiles again for other shapes of heads, not for other rows."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q, k, v, lengths):
    """FlexAttention with a mask of documents, or of pairs."""
    needs_gpu(q)
    from torch.nn.attention.flex_attention import create_block_mask

    doc_start = measure.doc_start_of(lengths, q.device)
    doc_end = measure.doc_end_of(lengths, q.device)

    def visible(batch, head, i, j):
        return (doc_start[i] <= j) & (j <= i)

    def visible_in_pairs(batch, head, i, j):
        return visible(batch, head, i, j) & (i < doc_end[j])

    seen = visible_in_pairs if measure.pairs_of(lengths) else visible
    mask = create_block_mask(seen, None, None, len(q), len(q), device=q.device)
    x = [t.detach().transpose(0, 1)[None].contiguous().requires_grad_() for t in (q, k, v)]
    gqa = q.shape[1] != k.shape[1]
    return lambda: compiled_flex()(*x, block_mask=mask, enable_gqa=gqa), x


def needs_gpu(x, lengths=()):
    """Raise `Unavailable` on CPU, and for pairs, where they are told of."""
    if measure.pairs_of(lengths):
        raise measure.Unavailable("knows no pairs")
    if x.device.type != "cuda":
        raise measure.Unavailable("needs a GPU")


ATTENTION = {
    "ours": ours,
    "ours, prompts twice": ours_twice,
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "varlen": varlen,
    "flex": flex,
}


def attention_cases(toy):
    """(name of the row, lengths of its documents, H, Hk, D), 7B's heads first."""
    if toy:
        rows = {"dense 32": [32] * 4, "packed 20": measure.packed_lengths(20, 128)}
        rows["pairs 9 + 7"] = [(9, 7, 5)] * 3
        return [(name, lengths, 4, 2, 32) for name, lengths in rows.items()]
    rows = {f"dense {n}": [n] * (16384 // n) for n in (8192, 512, 1024, 2048, 4096, 16384)}
    rows = {f"packed {mean}": measure.packed_lengths(mean, 16384) for mean in (490, 1097)} | rows
    for prompt, answer in ((1000, 200), (185, 305)):
        pairs = [(prompt, answer, answer)] * (16384 // (prompt + 2 * answer))
        rows = {f"pairs {prompt} + {answer}": pairs} | rows
    shapes = [(32, Hk, D) for D in (128, 64) for Hk in (32, 8)]
    return [(name, lengths, *shape) for shape in shapes for name, lengths in rows.items()]


def time_attention(provider, lengths, H, Hk, D, device, dtype):
    """Milliseconds and TFLOP/s of forward, backward and both."""
    torch.manual_seed(0)
    T = measure.row_tokens(lengths)
    q, k, v = (
        torch.randn(T, heads, D, device=device, dtype=dtype).requires_grad_()
        for heads in (H, Hk, Hk)
    )
    call, inputs = provider(q, k, v, lengths)
    with torch.no_grad():
        forward = measure.milliseconds(call, device)
    out = call()
    d_out = torch.randn_like(out)

    def backward():
        torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    def both():
        torch.autograd.grad(call(), inputs, d_out)

    ms = {
        "forward": forward,
        "backward": measure.milliseconds(backward, device),
        "both": measure.milliseconds(both, device),
    }
    flops = measure.attention_flops(lengths, H, D)
    return {"ms": ms, "tflops": {name: flops[name] / t / 1e9 for name, t in ms.items()}}


def three_products(hidden, weight, labels):
    """Logits and both gradients as three matrix products, nothing else: the lower bound."""
    d_logits = torch.mm(hidden, weight.T)
    return torch.mm(d_logits, weight), torch.mm(d_logits.T, hidden)


def gradients_of(loss):
    """Forward and backward of a loss."""

    def call(hidden, weight, labels):
        hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
        return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    return call


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
        raise measure.Unavailable("this torch has none")
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def liger(hidden, weight, labels):
    """Liger's fused linear cross-entropy."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise measure.Unavailable("liger-kernel is not installed") from None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


LOSSES = {
    "three products": three_products,
    "ours, uniform": gradients_of(ours_uniform),
    "ours, any gradient": gradients_of(ours_any),
    "eager": gradients_of(eager),
    "torch": gradients_of(torch_fused),
    "liger": gradients_of(liger),
}


def loss_cases(toy):
    """(N, V, E)."""
    return [(n, 101, 32) for n in (16, 64)] if toy else [
        (n, 32000, 4096) for n in (16384, 2048, 4096, 8192, 32768)
    ]  # fmt: skip


def time_loss(provider, N, V, E, device, dtype):
    """Milliseconds of forward and backward, TFLOP/s by three products, and memory in MiB.

    The peak is the memory beyond the inputs; it includes the two gradients, also given alone.
    """
    torch.manual_seed(0)
    hidden = torch.randn(N, E, device=device, dtype=dtype)
    weight = torch.randn(V, E, device=device, dtype=dtype) / E**0.5
    labels = torch.randint(V, (N,), device=device)

    def call():
        return provider(hidden, weight, labels)

    call()
    result = {}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        result["gradients_mib"] = 2 * (hidden.numel() + weight.numel()) / 2**20
    ms = measure.milliseconds(call, device)
    return {"ms": ms, "tflops": measure.cross_entropy_flops(N, V, E) / ms / 1e9} | result


def jobs(toy, device, dtype):
    """(kind, case, provider's name, function that measures), the most telling first."""
    attention_jobs = [
        ("attention", {"row": row, "H": H, "Hk": Hk, "D": D}, name,
         functools.partial(time_attention, provider, lengths, H, Hk, D, device, dtype))
        for row, lengths, H, Hk, D in attention_cases(toy)
        for name, provider in ATTENTION.items()
    ]  # fmt: skip
    loss_jobs = [
        ("cross_entropy", {"N": N, "E": E, "V": V}, name,
         functools.partial(time_loss, provider, N, V, E, device, dtype))
        for N, V, E in loss_cases(toy)
        for name, provider in LOSSES.items()
    ]  # fmt: skip
    nf4_jobs = [
        (
            "nf4",
            {"N": N, "K": K},
            name,
            functools.partial(decoding.time_nf4, provider, N, K, device, dtype),
        )
        for N, K in ([(64, 128)] if toy else [(11008, 4096), (4096, 4096), (28672, 8192)])
        for name, provider in decoding.DECODERS.items()
    ]
    first = [job for job in attention_jobs if job[1]["D"] == 128 and job[1]["Hk"] == 32]
    return first + loss_jobs + nf4_jobs + [job for job in attention_jobs if job not in first]


@dataclass(frozen=True)
class KernelsBenchConfig:
    """Flags of `python bench.py kernels`."""

    toy: bool = False  # tiny sizes, to rehearse on CPU
    minutes: float = 8.0  # no measurement begins after them
    out: str = "results/kernels.json"  # the figures


def main(arguments):
    """Measure, print a line each, and write the JSON file."""
    config = KernelsBenchConfig(**parse_args(KernelsBenchConfig, arguments))
    budget = measure.Budget(config.minutes)
    device = measure.gpu_unless_toy(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = {"attention": [], "cross_entropy": [], "nf4": []}
    for kind, case, name, job in jobs(config.toy, device, dtype):
        result = budget.measure(job)
        results[kind].append(case | {"provider": name} | result)
        print(f"{budget.seconds():4.0f} s", *case.values(), name, result, flush=True)
    facts = {"dtype": str(dtype), "seconds": budget.seconds()}
    record = measure.write("kernels", config, arguments, device, **facts, **results)
    print(*table.tables(record), *table.aims(record), sep="\n")
