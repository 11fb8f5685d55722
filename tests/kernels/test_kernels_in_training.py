"""Whole training steps by the kernels against the same steps of transformers' model.

On a GPU the kernels run compiled, in bf16, under FSDP2, recomputation and torch.compile, as sft.py
and dpo.py run them. Without one the same steps are taken in fp16 by Triton's interpreter. The other
side shares nothing with ours: another model, torch's own clipping and AdamW, no FSDP2.
"""

import functools
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.utils
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

import model as model_file
from kernels.attention import attention_triton, tiles_on_device
from kernels.cross_entropy import linear_cross_entropy_triton
from model import Llama, LlamaConfig
from program.ranks import start
from training.flags import RunFlags
from training.parallel import shard
from training.update import clip_gradients, make_optimizer

GPU = torch.cuda.is_available()
SIXTEEN = torch.bfloat16 if GPU else torch.float16
pytestmark = pytest.mark.kernel
CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
)
LENGTHS = [37, 1, 99]  # one across the edge of a tile


def use_kernels(monkeypatch):
    """Have model.py call the kernels, as it does by itself where there is a GPU."""
    if not GPU:
        monkeypatch.setattr(model_file, "attention", attention_triton)
        monkeypatch.setattr(model_file, "linear_cross_entropy", linear_cross_entropy_triton)
        # The compiler of graphs, but not its C++.
        graphs_only = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", graphs_only)


def whole(tensor):
    """A sharded tensor as this rank, the only one, holds it: all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def make_weights():
    """A random value of every parameter, by name, in fp32."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(CONFIG).named_parameters()}
    # Wide enough that heads attend to some tokens more than to others.
    return {
        name: 0.15 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def make_row(lengths, uniform):
    """input_ids and doc_start (T,), predict and labels (N,), and each loss's weight (N,)."""
    generator = torch.Generator().manual_seed(1)
    T, lengths = sum(lengths), torch.tensor(lengths, dtype=torch.int64)
    doc_start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    ids = torch.randint(CONFIG.vocab_size, (T,), generator=generator)
    predict = torch.arange(0, T, 2)
    weights = torch.full((len(predict),), 0.5)
    if not uniform:  # as in DPO
        weights = torch.randn(len(predict), generator=generator)
    return ids, doc_start.int(), predict, ids.roll(-1)[predict], weights


def two_steps(monkeypatch, dtype, lengths=LENGTHS, uniform=True, **how):
    """nll of two steps, as a list, and gradients of the first, as parameter name -> fp64."""
    with monkeypatch.context() as patch:
        use_kernels(patch)
        _, _, device = start()
        with torch.device("meta"):
            llama = Llama(CONFIG)
        shard(llama, RunFlags(dtype=str(dtype).removeprefix("torch."), **how), device)
        values = make_weights()
        with torch.no_grad():
            for name, parameter in llama.named_parameters():
                whole(parameter).copy_(values[name])
        flags = SimpleNamespace(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.0)
        optimizer = make_optimizer(llama, flags)
        *row, weights = (x.to(device) for x in make_row(lengths, uniform))
        losses, gradients = [], {}
        for step in range(2):
            nll = llama(*row, uniform_gradient=uniform, tiles=tiles_on_device(row[1]))
            losses.append(nll.detach().double().cpu())
            (nll * weights).sum().backward()
            if step == 0:
                for name, parameter in llama.named_parameters():
                    gradients[name] = whole(parameter.grad).double().cpu()
            clip_gradients(llama, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return losses, gradients


def their_two_steps(dtype, uniform=True):
    """The same by transformers' model in `dtype`, each document alone, on fp32 master weights."""
    device = "cuda" if GPU else "cpu"
    theirs = LlamaForCausalLM(TheirConfig(**asdict(CONFIG), attn_implementation="eager"))
    theirs.to(device, dtype)
    masters = {name: w.to(device) for name, w in make_weights().items()}
    optimizer = torch.optim.AdamW(masters.values(), 1e-3, (0.9, 0.95), weight_decay=0.0)
    ids, _, predict, labels, weights = (x.to(device) for x in make_row(LENGTHS, uniform))
    losses, gradients = [], {}
    for step in range(2):
        theirs.load_state_dict(masters)
        theirs.zero_grad()
        documents = [theirs(document[None]).logits[0] for document in ids.split(LENGTHS)]
        logits = torch.cat(documents)[predict].float()
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        losses.append(nll.detach().double().cpu())
        (nll * weights).sum().backward()
        for name, parameter in theirs.named_parameters():
            masters[name].grad = parameter.grad.float()
            if step == 0:
                gradients[name] = parameter.grad.double().cpu()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
    return losses, gradients


def assert_as_exact_as_transformers(monkeypatch, dtype, how, uniform):
    """The kernels' steps are no further from fp32 than transformers' in the same type.

    By norm, of the losses and of every gradient: 1.3 times that, for other orders of the same sums
    (0.7 to 1.05 times in fp16, since the kernels hold scores and logits in fp32).
    """
    exact = their_two_steps(torch.float32, uniform)
    same_type = their_two_steps(dtype, uniform)
    ours = two_steps(monkeypatch, dtype, uniform=uniform, **how)
    (exact, same_type, ours) = (
        {"first nll": nll[0], "second nll": nll[1], **gradients}
        for nll, gradients in (exact, same_type, ours)
    )
    assert exact.keys() == ours.keys()
    for name, e in exact.items():
        allowed = 1.3 * (same_type[name] - e).norm()
        error = (ours[name] - e).norm()
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


EVERYTHING = {"recompute": 2, "compile": True}


STEPS = {"sft, eager": (True, {}), "dpo, compiled": (False, EVERYTHING)}
if GPU:  # where they take seconds
    STEPS |= {"sft, compiled": (True, EVERYTHING), "dpo, eager": (False, {})}


@pytest.mark.parametrize("uniform, how", STEPS.values(), ids=STEPS)
def test_a_step_in_16_bits(uniform, how, monkeypatch):
    """Under FSDP2, with recomputation and torch.compile or without."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert_as_exact_as_transformers(monkeypatch, SIXTEEN, how, uniform)
    assert not counters["graph_break"]
    assert (counters["stats"]["unique_graphs"] > 0) == bool(how)


def test_rows_of_other_lengths_compile_nothing_new(monkeypatch):
    """After the second row no row is compiled again, and a block is one graph without a break."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    use_kernels(monkeypatch)
    _, _, device = start()
    with torch.device("meta"):
        llama = Llama(CONFIG)
    how = EVERYTHING | {"recompute": 1}  # of two blocks: each kind is compiled
    shard(llama, RunFlags(dtype=str(SIXTEEN).removeprefix("torch."), **how), device)
    with torch.no_grad():
        for parameter in llama.parameters():
            whole(parameter).normal_(0, 0.05)
    graphs = []
    for lengths in ([37, 1, 9], [20, 30], [16], [3] * 9):
        lengths = torch.tensor(lengths)
        doc_start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).int()
        ids = predict = torch.arange(len(doc_start))
        row = [x.to(device) for x in (ids, doc_start, predict, ids)]
        llama(*row, uniform_gradient=True, tiles=tiles_on_device(row[1]))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and set(graphs[2:]) == {graphs[1]}
    assert not counters["graph_break"]


def test_recomputation_changes_no_bit(monkeypatch):
    """Of losses and gradients: what is made twice is the same twice."""
    plain = two_steps(monkeypatch, SIXTEEN)
    recomputed = two_steps(monkeypatch, SIXTEEN, recompute=2)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], recomputed[0], strict=True))
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name


def test_a_row_without_tokens(monkeypatch):
    """A rank without work runs an empty row, so that all run equally often: gradients are zero."""
    torch._dynamo.reset()
    losses, gradients = two_steps(monkeypatch, SIXTEEN, [], **EVERYTHING)
    assert [len(nll) for nll in losses] == [0, 0]
    assert all(not gradient.any() for gradient in gradients.values())
