"""kernels/cross_entropy.py against its definition in fp64; the kernel on a GPU or interpreted."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import kernels.cross_entropy
from kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)
from program.ranks import start

GPU = torch.cuda.is_available()
SIXTEEN = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # the interpreter lacks bf16


def make_inputs(N, V, E, dtype, seed=0):
    """hidden, weight, labels, upstream gradient; with hard rows among them, see below."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64)
    hidden = torch.randn(N, E, generator=generator, dtype=torch.float64) / E**0.5
    labels = torch.randint(V, (N,), generator=generator)
    d_nll = torch.randn(N, generator=generator, dtype=torch.float64)
    # Along the label's own weight: a confident row (p -> 1), one whose logits overflow exp unless
    # the maximum is taken off, and one that is as sure of the wrong class.
    for row, size, towards in ((0, 25.0, 0), (1, 400.0, 0), (2, 50.0, 1)):
        if row < N:
            direction = weight[(labels[row] + towards) % V]
            hidden[row] = size * direction / direction.square().sum()
    return hidden.to(dtype), weight.to(dtype), labels, d_nll.to(dtype)


def run(function, hidden, weight, labels, d_nll):
    """nll and both gradients."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    nll = function(hidden, weight, labels)
    nll.backward(d_nll.to(nll.dtype))
    return nll.detach(), hidden.grad, weight.grad


def uniform(*inputs):
    """The form of SFT: gradients in the forward pass."""
    return linear_cross_entropy(*inputs, uniform_gradient=True)


@pytest.mark.parametrize("N, V, E", [(1, 7, 3), (37, 101, 7), (101, 515, 37)])
def test_cpu_equals_the_definition_for_any_upstream_gradient(N, V, E, monkeypatch):
    """nll and gradients in fp64, to rounding, across several chunks and a ragged last one."""
    monkeypatch.setattr(kernels.cross_entropy, "CPU_WORKSPACE", 10 * V * 8)
    inputs = make_inputs(N, V, E, torch.float64)
    exact = run(linear_cross_entropy_reference, *inputs)
    for a, b in zip(run(linear_cross_entropy, *inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_uniform_gradient_is_the_same_gradient():
    """Made in the forward pass and scaled, for a loss that is a multiple of nll.sum()."""
    hidden, weight, labels, _ = make_inputs(37, 101, 7, torch.float64)
    d_nll = torch.full((37,), 0.3, dtype=torch.float64)
    now = run(uniform, hidden, weight, labels, d_nll)
    later = run(linear_cross_entropy, hidden, weight, labels, d_nll)
    for a, b in zip(now, later, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_uniform_gradient_is_not_rounded_as_a_whole():
    """In bf16, 0.3 would become 0.30078, and every gradient 0.26 % larger.

    Elements are rounded twice, by at most 2^-8 and independently: the mean error over 100 large
    ones is some 3e-4.
    """
    hidden, weight, labels, _ = make_inputs(37, 101, 64, torch.bfloat16)
    d_nll = torch.full((37,), 0.3)
    rounded = run(uniform, hidden, weight, labels, d_nll)[1:]
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), labels, d_nll)[1:]
    for a, e in zip(rounded, exact, strict=True):
        assert ((a.double() * e).sum() / (e * e).sum() - 1).abs() < 1e-3


def test_a_broken_promise_of_uniformity_is_nan():
    """The gradient of another loss would be silently wrong."""
    inputs = make_inputs(5, 11, 3, torch.float32)
    _, d_hidden, d_weight = run(uniform, *inputs)
    assert d_hidden.isnan().all() and d_weight.isnan().all()


@pytest.mark.parametrize("promised", [False, True])
def test_no_tokens(promised):
    """A row with nothing to predict: no losses, gradients of zero."""
    hidden = torch.zeros(0, 3, requires_grad=True)
    weight = torch.ones(5, 3, requires_grad=True)
    nll = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), promised)
    nll.sum().backward()
    assert nll.shape == (0,) and hidden.grad.shape == (0, 3)
    assert torch.equal(weight.grad, torch.zeros(5, 3))


def test_without_gradients_none_are_made(monkeypatch):
    """Under no_grad (the reference pass of DPO) the forward pass is one matrix product."""
    hidden, weight, labels, _ = make_inputs(5, 11, 3, torch.float32)
    asked = []

    def spy(h, w, y, d_nll=None, trained=True):
        asked.append(d_nll)
        return h.new_zeros(len(y)), None, None

    monkeypatch.setattr(kernels.cross_entropy, "cross_entropy_cpu", spy)
    with torch.no_grad():
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, uniform_gradient=True)
    assert asked == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    """nll is fp32; the gradients have the types of hidden and weight."""
    inputs = make_inputs(7, 11, 3, dtype)
    nll, d_hidden, d_weight = run(linear_cross_entropy, *inputs)
    assert (nll.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, dtype, dtype)


def naive(hidden, weight, labels):
    """The definition with the logits in the inputs' own type, as Hugging Face's models have it."""
    logits = (hidden @ weight.T).float()
    return logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]


def assert_as_exact_as_naive(function, inputs):
    """The error against fp64 is at most twice the naive one's in the same type, plus a floor.

    Twice: the same sums in another order. The floor, two roundings of the largest value, is for
    where the naive result happens to be exact.
    """
    dtype = inputs[0].dtype
    exact = run(linear_cross_entropy_reference, *(x.double() for x in inputs[:2]), *inputs[2:])
    same_type = run(naive, *inputs)
    ours = [x.cpu() for x in run(function, *on_device_of(function, *inputs))]
    for name, e, n, o in zip(("nll", "d_hidden", "d_weight"), exact, same_type, ours, strict=True):
        assert o.shape == e.shape
        floor = 2 * torch.finfo(dtype).eps * e.abs().max()
        allowed = 2 * (n.double() - e).abs().max() + floor
        error = (o.double() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


BOTH = [
    linear_cross_entropy,
    pytest.param(linear_cross_entropy_triton, marks=pytest.mark.kernel),
]


def on_device_of(function, *inputs):
    """The kernel needs a GPU where Triton does not interpret."""
    gpu = GPU and function is linear_cross_entropy_triton
    return [x.cuda() if gpu else x for x in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("N, V, E", [(1, 7, 3), (37, 101, 7), (3, 33001, 16), (101, 515, 37)])
@pytest.mark.parametrize("function", BOTH)
def test_as_exact_as_naive(function, N, V, E, dtype):
    """For a random upstream gradient; a row of 33001 is two blocks of the kernel and a bit."""
    assert_as_exact_as_naive(function, make_inputs(N, V, E, dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("promised", [False, True])
def test_kernel_in_several_chunks(promised, monkeypatch):
    """Chunks of 64 rows and a ragged last one give what one chunk gives.

    Also where every row has an upstream gradient of its own, as it must not have where promised.
    """
    *inputs, d_nll = make_inputs(150, 37, 16, torch.float32)
    inputs = *inputs, torch.full((150,), -0.7) if promised else d_nll
    inputs = on_device_of(linear_cross_entropy_triton, *inputs)
    whole = run(linear_cross_entropy_triton, *inputs)
    monkeypatch.setattr(kernels.cross_entropy, "ROWS", 64)
    monkeypatch.setattr(kernels.cross_entropy, "CUDA_WORKSPACE", 0)

    def function(*x):
        return linear_cross_entropy_triton(*x, uniform_gradient=promised)

    # fp32 sums in another order over 150 tokens: 150 roundings at the very most.
    for a, b in zip(run(function, *inputs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=150 * 6e-8)


@pytest.mark.parametrize("function", BOTH)
def test_the_true_class_keeps_its_gradient(function):
    """At p = 1 - 1e-6 the label's gradient is -1e-6, also where 16 bits round p to 1."""
    weight = torch.eye(2, dtype=torch.float16)
    hidden = torch.tensor([[13.8155, 0.0]], dtype=torch.float16)  # ln(1e6), to 11 bits
    p = torch.sigmoid(-hidden[0, 0].double()).item()
    inputs = hidden, weight, torch.tensor([0]), torch.tensor([1000.0])
    _, d_hidden, _ = run(function, *on_device_of(function, *inputs))
    torch.testing.assert_close(d_hidden[0, 0].item(), -1000 * p, rtol=2**-10, atol=0)


@pytest.mark.kernel
def test_operator_has_shapes_for_the_compiler():
    """torch's own checks of a custom operator, with gradients and without."""
    inputs = make_inputs(5, 11, 16, torch.float32)
    hidden, weight, labels, d_nll = on_device_of(linear_cross_entropy_triton, *inputs)
    for upstream in (d_nll, None):
        torch.library.opcheck(
            torch.ops.tulu.cross_entropy,
            (hidden, weight, labels, upstream),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("promised", [False, True])
def test_weight_gathered_by_fsdp(function, promised):
    """A sharded head, gathered for the root's passes, gets the gradient of a plain head."""

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(16, 11, bias=False)

        def forward(self, hidden, labels):
            return function(hidden, self.lm_head.weight, labels, uniform_gradient=promised)

    start()  # a process group of this process alone
    inputs = *make_inputs(5, 11, 16, torch.float32)[:3], torch.full((5,), 0.5)
    hidden, weight, labels, halves = on_device_of(function, *inputs)
    root = Root().to(weight.device)
    root.load_state_dict({"lm_head.weight": weight})
    mesh = init_device_mesh(weight.device.type, (1,))
    precision = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    fully_shard(root, mesh=mesh, mp_policy=precision)
    (root(hidden, labels).sum() * 0.5).backward()
    expected = run(function, hidden.half(), weight.half(), labels, halves)[2]
    torch.testing.assert_close(root.lm_head.weight.grad.full_tensor(), expected.float())


@pytest.mark.gpu
@pytest.mark.parametrize("promised", [False, True])
def test_on_a_gpu_in_bf16(promised):
    """Several chunks of the shipped size, against fp64: nll to fp32, gradients to bf16."""
    inputs = make_inputs(6000, 32000, 256, torch.bfloat16)
    hidden, weight, labels, d_nll = (x.cuda() for x in inputs)
    d_nll = torch.full_like(d_nll, 0.3) if promised else d_nll

    def function(*x):
        return linear_cross_entropy(*x, uniform_gradient=promised)

    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), labels, d_nll)
    nll, *gradients = run(function, hidden, weight, labels, d_nll)
    # Logits have fp32 sums of exact products: 1e-5 of the largest, 400.
    torch.testing.assert_close(nll.double(), exact[0], rtol=1e-5, atol=4e-3)
    for e, o in zip(exact[1:], gradients, strict=True):
        error = (o.double() - e).norm() / e.norm()
        assert error < 2 * 2**-8, f"relative error {error:.1e}"


@pytest.mark.gpu
def test_on_a_gpu_the_same_bits_every_time():
    """Deterministic."""
    inputs = [x.cuda() for x in make_inputs(6000, 32000, 256, torch.bfloat16)]
    first = run(linear_cross_entropy, *inputs)
    for a, b in zip(first, run(linear_cross_entropy, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_on_a_gpu_working_memory_is_bounded():
    """Whatever N: below 600 MiB beside the inputs and the two gradients, at 7B's width."""
    hidden = torch.randn(20_000, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(32_000, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(32_000, (20_000,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels, uniform_gradient=True)
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients < 600 << 20


@pytest.mark.kernel
@pytest.mark.parametrize("uniform", [False, True])
def test_a_head_that_is_not_trained_costs_no_product(uniform):
    """The losses and the gradient of hidden are the same; the weight gets none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator).to(device).requires_grad_()
    weight = torch.randn(37, 16, generator=generator).to(device)
    labels = torch.randint(37, (9,), generator=generator).to(device)
    for loss in (linear_cross_entropy, linear_cross_entropy_triton):
        results = []
        for w in (weight.clone().requires_grad_(), weight):
            nll = loss(hidden, w, labels, uniform_gradient=uniform)
            results.append((nll.detach(), *torch.autograd.grad(nll.sum() * 3, hidden)))
        assert all(map(torch.equal, *results))
