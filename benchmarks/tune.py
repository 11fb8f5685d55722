"""Block sizes of the kernels, timed beside those that are shipped: `python bench.py tune`.

To rehearse without a GPU: `TRITON_INTERPRET=1 python bench.py tune --toy`.

Every candidate runs alone, on dense and on chat-like rows of 16k tokens with 7B's heads, and must
give the result of the shipped sizes. At the end all candidates are printed by time, for each kernel
and row. The winners go into `blocks` of kernels/attention_tiles.py and the constants of
kernels/cross_entropy.py.
"""

import functools
from dataclasses import dataclass

import torch

from benchmarks import measure
from kernels import attention, cross_entropy
from program.flags import parse_args

# (BM, BN, num_warps, num_stages) that compile for sm_90 at D = 128 without spills under Triton 3.6.
# A multiprocessor holds two or three programs of 4 warps, which hide each other's waits.
CANDIDATES = {
    "forward_kernel": [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
    ],
    "backward_q_kernel": [
        (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 128, 8, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
    ],
    "backward_kv_kernel": [
        (128, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3),
        (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3),
    ],
}  # fmt: skip
SOFTMAX = [(4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32), (32768, 32)]  # BLOCK, warps
WORKSPACES = [128, 256, 384, 512]  # MiB
PRODUCTS = {"forward_kernel": 2, "backward_q_kernel": 3, "backward_kv_kernel": 4}  # of matrices


class Case:
    """A row's tensors, and launches of single kernels on it."""

    def __init__(self, lengths, H, Hk, D, device, dtype):
        torch.manual_seed(0)
        T = sum(lengths)
        self.lengths, self.shape = lengths, (T, 0, H, Hk, D)  # 0 holes
        q, k, v, d_out = (
            torch.randn(T, heads, D, device=device, dtype=dtype) for heads in (H, Hk, Hk, H)
        )
        tiles = attention.tiles_on_device(measure.doc_start_of(lengths, device))
        out, lse = attention.attention_op(q, k, v, tiles)
        delta, dq, dk, dv = (torch.empty_like(x) for x in (lse, q, k, v))
        self.arguments = {
            "forward_kernel": (q, k, v, out, lse, tiles),
            "backward_q_kernel": (q, k, v, out, d_out, lse, delta, dq, tiles),
            "backward_kv_kernel": (q, k, v, d_out, lse, delta, dk, dv, tiles),
        }
        self.results = {
            "forward_kernel": (out,),
            "backward_q_kernel": (dq,),
            "backward_kv_kernel": (dk, dv),
        }

    def shipped(self, name):
        """The sizes in `blocks`."""
        q = self.arguments[name][0]
        size = attention.blocks(name, q.dtype, attention.shared_memory(q))
        return size["BM"], size["BN"], size["num_warps"], size["num_stages"]

    def launch(self, name, candidate):
        """Run one kernel with the sizes of a candidate."""
        BM, BN, warps, stages = candidate
        _, _, H, Hk, _ = self.shape
        rows, heads = (BN, Hk) if name == "backward_kv_kernel" else (BM, H)
        *_, tiles = self.arguments[name]
        grid = tiles.shape[1] * (attention.TILE // rows), heads
        getattr(attention, name)[grid](
            *self.arguments[name], *self.shape, BM=BM, BN=BN, num_warps=warps, num_stages=stages
        )

    def measure(self, name, candidate, device):
        """Time, TFLOP/s of the kernel's own products, and its relative error."""
        self.launch(name, self.shipped(name))
        expected = [x.clone() for x in self.results[name]]
        for x in self.results[name]:
            x.fill_(torch.nan)
        try:
            self.launch(name, candidate)
            errors = [
                ((x.float() - e.float()).norm() / e.float().norm()).item()
                for x, e in zip(self.results[name], expected, strict=True)
            ]
            assert max(errors) < 2**-7, f"other than the shipped sizes' result by {errors}"
            ms = measure.milliseconds(lambda: self.launch(name, candidate), device)
        finally:  # the other kernels read this one's result
            self.launch(name, self.shipped(name))
        _, _, H, _, D = self.shape
        flops = measure.attention_flops(self.lengths, H, D)["forward"] * PRODUCTS[name] / 2
        return {"ms": ms, "tflops": flops / ms / 1e9, "error": max(errors)}


def measure_softmax(candidate, device, toy):
    """The loss's kernel alone, on one chunk of logits that its gradients overwrite."""
    rows, V = (8, 96) if toy else (2048, 32000)
    block, warps = candidate
    logits = torch.randn(rows, V, device=device)
    labels = torch.randint(V, (rows,), device=device)
    nll, d_nll = torch.empty(rows, device=device), torch.ones(rows, device=device)
    d_logits = logits.view(torch.bfloat16 if device.type == "cuda" else torch.float16)[:, :V]

    def call():
        cross_entropy.softmax_kernel[(rows,)](
            logits, d_logits, labels, d_nll, nll, V, V, d_logits.stride(0), True, block,
            num_warps=warps,
        )  # fmt: skip

    return {"ms": measure.milliseconds(call, device)}


def measure_workspace(mib, device, dtype, toy):
    """Head and loss, both ways, with chunks of so many MiB of logits."""
    N, V, E = (32, 101, 32) if toy else (16384, 32000, 4096)
    hidden = torch.randn(N, E, device=device, dtype=dtype)
    weight = torch.randn(V, E, device=device, dtype=dtype) / E**0.5
    labels, ones = torch.randint(V, (N,), device=device), torch.ones(N, device=device)
    shipped = cross_entropy.CUDA_WORKSPACE
    try:
        cross_entropy.CUDA_WORKSPACE = mib << 20
        call = functools.partial(cross_entropy.cross_entropy_triton, hidden, weight, labels, ones)
        return {"ms": measure.milliseconds(call, device)}
    finally:
        cross_entropy.CUDA_WORKSPACE = shipped


def jobs(toy, device, dtype):
    """(kernel, row, candidate, function that measures)."""
    rows = {"packed 20": measure.packed_lengths(20, 64)} if toy else {
        "packed 490": measure.packed_lengths(490, 16384),  # as in training, so the first
        "dense 8192": [8192] * 2,
        "packed 1097": measure.packed_lengths(1097, 16384),
    }  # fmt: skip
    for heads in [(2, 1, 16)] if toy else [(32, 32, 128), (32, 32, 64)]:
        for row, lengths in rows.items():
            case = Case(lengths, *heads, device, dtype)
            for name, candidates in CANDIDATES.items():
                shipped = case.shipped(name)
                for candidate in [shipped] + [c for c in candidates if c != shipped]:
                    job = functools.partial(case.measure, name, candidate, device)
                    yield name, f"{row}, D {heads[2]}", candidate, job
        if heads[2] != 64:
            for candidate in SOFTMAX:
                job = functools.partial(measure_softmax, candidate, device, toy)
                yield "softmax_kernel", "2048 x 32000", candidate, job
            for mib in WORKSPACES:
                job = functools.partial(measure_workspace, mib, device, dtype, toy)
                yield "head and loss", "N 16384", (mib,), job


@dataclass(frozen=True)
class TuneConfig:
    """Flags of `python bench.py tune`."""

    toy: bool = False  # tiny sizes, interpreted, on CPU
    minutes: float = 7.0  # no measurement begins after them
    out: str = "results/tune.json"  # the figures


def main(arguments):
    """Measure, print a line each, then the candidates by time, and write the JSON file."""
    config = TuneConfig(**parse_args(TuneConfig, arguments))
    budget = measure.Budget(config.minutes)
    device = measure.gpu_unless_toy(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    results = []
    for name, row, candidate, job in jobs(config.toy, device, dtype):
        result = budget.measure(job)
        results.append({"kernel": name, "row": row, "candidate": candidate} | result)
        print(f"{budget.seconds():4.0f} s", name, row, candidate, result, flush=True)
    measure.write("tune", config, arguments, device, dtype=str(dtype), results=results)
    for group in dict.fromkeys((r["kernel"], r["row"]) for r in results):
        timed = [r for r in results if (r["kernel"], r["row"]) == group and "ms" in r]
        by_time = sorted(timed, key=lambda r: r["ms"])
        listed = ", ".join(f"{'/'.join(map(str, r['candidate']))} {r['ms']:.3f}" for r in by_time)
        print(*group, "ms:", listed, sep="  ")
