"""The same pass gives the same bits on CPU: again, beside load, in other memory and processes.

Run alone, this file prints the digest of one pass, for the test that compares processes.
"""

import hashlib
import os
import platform
import sys
import threading
from contextlib import contextmanager
from subprocess import PIPE, Popen

import pytest
import torch

from kernels import cross_entropy as loss_file
from kernels.attention import attention_triton
from kernels.cross_entropy import linear_cross_entropy_triton
from model import Llama, LlamaConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels; CPU: interpreted
CONFIG = LlamaConfig(
    vocab_size=1031,
    hidden_size=96,
    intermediate_size=258,  # times 153 tokens: enough that element-wise operations take 2 threads
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=True,  # the embedding's gradient is a sum of two
)
LENGTHS = [31, 7, 64, 1, 50]  # 153 tokens


def make_model():
    """A model with random weights, wide enough that its losses differ by token."""
    generator = torch.Generator().manual_seed(0)
    llama = Llama(CONFIG)
    with torch.no_grad():
        for parameter in llama.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * values if values.ndim == 1 else 0.15 * values)
    return llama


def one_pass(llama):
    """Name -> tensor: logits, and for both kinds of loss the nll and every gradient."""
    generator = torch.Generator().manual_seed(1)
    T, lengths = sum(LENGTHS), torch.tensor(LENGTHS)
    ids = torch.randint(CONFIG.vocab_size, (T,), generator=generator)
    doc_start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).int()
    predict = torch.arange(0, T, 2)
    labels = ids.roll(-1)[predict]
    with torch.no_grad():
        results = {"logits": llama(ids, doc_start, predict)}
    for uniform in (True, False):
        llama.zero_grad()
        nll = llama(ids, doc_start, predict, labels, uniform_gradient=uniform)
        weights = torch.ones(len(nll)) if uniform else torch.linspace(-1, 1, len(nll))
        (nll * weights).sum().backward()
        results[f"nll, uniform {uniform}"] = nll.detach()
        for name, parameter in llama.named_parameters():
            results[f"{name}, uniform {uniform}"] = parameter.grad
    return results


def kernels():
    """Name -> tensor: results and gradients of both kernels, at lengths that fill no tile."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        values = torch.randn(shape, generator=generator)
        return values.to(DEVICE).requires_grad_()

    q, k, v = random(23, 2, 16), random(23, 1, 16), random(23, 1, 16)
    out = attention_triton(q, k, v, torch.tensor([0] * 9 + [9] * 14, device=DEVICE).int())
    hidden, head = random(5, 16), random(37, 16)
    nll = linear_cross_entropy_triton(hidden, head, torch.arange(5, device=DEVICE))
    (out.square().sum() + nll.square().sum()).backward()
    inputs = {"q": q, "k": k, "v": v, "hidden": hidden, "head": head}
    gradients = {name: x.grad for name, x in inputs.items()}
    return {"out": out.detach(), "nll": nll.detach(), **gradients}


def assert_same_bits(results, first):
    """All tensors are equal; a NaN on both sides would not be."""
    assert results.keys() == first.keys()
    for name, value in results.items():
        moved = (value - first[name]).abs().max()
        assert torch.equal(value, first[name]), f"{name}: moved by up to {moved:.1e}"


@contextmanager
def load():
    """Two threads that compute all the while, each with workers of its own."""
    done = threading.Event()

    def work():
        x = torch.rand(300, 300)
        while not done.is_set():
            (x @ x).relu_().sum()

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


@pytest.mark.kernel
def test_a_pass_repeats_beside_load_and_after_kernels():
    """Bit for bit, in memory that held NaN, with the kernels run in between."""
    llama = make_model()
    first = {name: value.clone() for name, value in one_pass(llama).items()}
    assert first["nll, uniform True"].std() > 0.5
    with load():
        for repeat in range(20):
            if repeat == 10:
                kernels()
            for value in first.values():  # freed at once, to be taken for a result
                torch.full_like(value, torch.nan)
            assert_same_bits(one_pass(llama), first)


@pytest.fixture
def filled():
    """Turn on torch's filling of uninitialised memory: NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # the default

    def turn_on():
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.empty(3).isnan().all()

    yield turn_on
    torch.use_deterministic_algorithms(before)


@pytest.mark.kernel
def test_no_uninitialised_memory_reaches_a_result(filled, monkeypatch):
    """Bit for bit the same with NaN in all new memory, in chunks of the loss and in kernels."""
    # 10 rows at a time of 77: the workspace is used again, and its last part is left over.
    monkeypatch.setattr(loss_file, "CPU_WORKSPACE", 10 * 4 * CONFIG.vocab_size)
    llama = make_model()
    first, first_kernels = one_pass(llama), kernels()
    filled()
    assert_same_bits(one_pass(llama), first)
    assert_same_bits(kernels(), first_kernels)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc fills memory")
def test_fresh_processes_agree():
    """Two at once, in which all new memory, of C++ too, holds -1.7e38 or 3.4e38."""
    running = []
    for byte in (1, 128):  # new memory is filled with its complement, to 32 MiB
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "GLIBC_TUNABLES": f"glibc.malloc.perturb={byte}:glibc.malloc.mmap_threshold={1 << 25}",
        }
        command = [sys.executable, __file__]
        running.append(Popen(command, stdout=PIPE, env=environment, text=True))
    (first, filled), (second, filled_too) = (p.communicate()[0].split() for p in running)
    assert (filled, filled_too) == ("fe" * 4, "7f" * 4)
    assert first == second


if __name__ == "__main__":
    sha = hashlib.sha256()
    for result in one_pass(make_model()).values():
        sha.update(result.contiguous().numpy().tobytes())
    print(sha.hexdigest(), torch.empty(12_345)[100:101].numpy().tobytes().hex())
