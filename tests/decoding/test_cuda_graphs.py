"""A GPU's step: recorded, replayed and compiled, in fp32. Without a GPU by Triton's interpreter and
a recording that is made up; what runs is the same else."""

from functools import partial

import pytest
import torch
from test_generator import Numbers, make_prompts
from torch._dynamo import lookup_backend

from decoding.cuda_graphs import GraphedStep
from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from kernels import decode_attention as kernel_file
from test_model import VARIANTS, make_pair

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
# The kernels take heads of 16 elements and more.
MODELS = {name: VARIANTS[name] | {"head_dim": 16} for name in ("1:1", "2:1, like Code Llama")}


class Replayed(GraphedStep):
    """Without a GPU: the recorded step runs again, on the inputs that it was recorded with."""

    def captured(self, inputs, cache):
        logits = self.step(*inputs, cache)
        return lambda: logits.copy_(self.step(*inputs, cache)), inputs, logits


def graphed(model, monkeypatch, slots=4, compile=True):
    """A generator on CPU that decodes as one on a GPU does."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    generator = TextGenerator(model, Numbers(), slots=slots)
    generator.cached.graphs = Replayed(model, compile)
    return generator


class ByDefinition:
    """The decoding kernel's definition in its place, which takes a hundredth of the time."""

    def __getitem__(self, grid):
        return self

    def __call__(self, q, k, v, keys, values, positions, parts, lse, S, H, Hk, D, splits, **_):
        keys, values = keys.view(-1, Hk, S, D), values.view(-1, Hk, S, D)
        parts, slots = parts.view(len(q), H, splits, D), torch.arange(len(q))
        parts.zero_()[:, :, 0] = kernel_file.decode_reference(q, k, v, keys, values, positions)
        lse.fill_(kernel_file.LOW.value)[:, :, 0] = 0
        keys[slots, :, positions], values[slots, :, positions] = k, v


@pytest.fixture
def by_definition(monkeypatch):
    """For tests of everything around the kernel; test_decode_attention.py proves it."""
    monkeypatch.setattr(kernel_file, "decode_kernel", ByDefinition())


@INTERPRETED
@pytest.mark.parametrize("name, compile", [("2:1, like Code Llama", True), ("1:1", False)])
def test_recorded_steps_give_the_same_tokens(name, compile, monkeypatch):
    """With padded batches, with more prompts than slots, as a stream, sampled, and with scores."""
    ours, _ = make_pair(MODELS[name])
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    prompts, options = make_prompts(5, beginning=41), [[[4, 5], [9]]] * 5
    answers = []
    for generator in (TextGenerator(ours, Numbers(), slots=3),
                      graphed(ours, monkeypatch, 3, compile)):  # fmt: skip
        answers.append([generator.generate(prompts, Sampling(4, temperature=t)) for t in (0, 1)])
        answers[-1].append(list(generator.stream(prompts[0], Sampling(3))))
        answers[-1].append(generator.option_logps(prompts, options))
    assert answers[0] == answers[1]
    assert generator.cached.graphs.recorded.keys() >= ({1, 3} if compile else set())


@INTERPRETED
def test_one_block_is_compiled_for_all(by_definition, monkeypatch):
    """Once for one sequence and once for several, whatever their number, the layer and the cache;
    and in one graph each. Also where there are, by chance, as many as a head has elements."""
    ours, _ = make_pair(MODELS["2:1, like Code Llama"])
    compiled, compile, aot_eager = [], torch.compile, lookup_backend("aot_eager")

    def backend(graph, inputs):
        sizes = {
            n.name: n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"
        }
        projections = [n for n in graph.graph.nodes if "linear" in str(n.target)]
        compiled.append((str(sizes["l_x_"].shape), len(projections)))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(compile, backend=backend, fullgraph=True))
    generator, prompts = graphed(ours, monkeypatch, slots=16), make_prompts(16)
    expected = TextGenerator(ours, Numbers(), slots=16)
    for batch in (prompts[:1], prompts, [prompts[1] * 9], [prompts[1] * 18] + prompts[:2]):
        answers = generator.generate(batch, Sampling(2))
        assert [a.ids for a in answers] == [a.ids for a in expected.generate(batch, Sampling(2))]
    cache = generator.cached.cache
    assert cache.capacity == 768  # the third one
    # Changed arguments that share memory would be copied whole, in each layer, by torch.compile.
    storages = {x.untyped_storage().data_ptr() for x in (cache.keys[0], cache.values[0])}
    assert len(storages) == 2
    # torch begins the first one again: it learns on the way that rope_theta is one number.
    assert len(compiled) <= 3
    assert len(set(compiled)) == 2  # for (1, 32), and for any number
    assert {projections for _, projections in compiled} == {7}  # of one block


@INTERPRETED
def test_a_step_waits_for_its_token_alone(by_definition, monkeypatch):
    """What brings a value of a tensor to the host is called once a step, by `choose`.

    Not seen: waiting inside of torch. Values that go to the device pass through `on_device`.
    """
    ours, _ = make_pair(MODELS["1:1"])
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    generator = graphed(ours, monkeypatch)
    generator.generate(make_prompts(4), Sampling(2))
    calls = []

    def counted(name, real):
        def method(self, *arguments, **options):
            calls.append(name)
            return real(self, *arguments, **options)

        return method

    for sampling in (Sampling(9), Sampling(9, temperature=1.0, top_p=0.9)):
        prompts, real = make_prompts(4), generator.cached.next_logits
        counts = []

        def step(*arguments, real=real, counts=counts):
            counts.append(len(calls))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(generator.cached, "next_logits", step)
            for name in ("cpu", "item", "numpy", "nonzero"):
                patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
            generator.generate(prompts, sampling)
        between = {b - a for a, b in zip(counts, counts[1:], strict=False)}
        assert between == {1}


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beginning", [0, 41])
def test_graphs_on_a_gpu(beginning, name, compile):
    """Tokens of recorded steps, and of steps that are not, are the CPU's, in fp32."""
    ours, _ = make_pair(MODELS[name])
    prompts, sampling = make_prompts(11, beginning), Sampling(300)
    expected = TextGenerator(ours, Numbers(), slots=4).generate(prompts, sampling)
    generator = TextGenerator(ours.cuda(), Numbers(), slots=4, compile=compile)
    answers = generator.generate(prompts, sampling)
    assert [a.ids[:20] for a in answers] == [a.ids[:20] for a in expected]
    assert len(generator.cached.graphs.recorded) == (3 if compile else 0)
    by_memory = TextGenerator(ours, Numbers(), compile=compile)
    found = by_memory.generate(prompts, sampling)
    assert [a.ids[:20] for a in found] == [a.ids[:20] for a in expected]
    assert by_memory.slots == 16
