"""LESS's parts against what they stand for: real steps of Adam, and exact inner products."""

import math

import numpy as np
import pytest
import torch

from checkpoint.config import read_config
from checkpoint.weights import load_hf
from model import Llama
from selection import influence
from selection.embeddings import answer_losses
from selection.probe import put_probes

CPU = torch.device("cpu")


def some(count, seed=0, most=60):
    """Random conversations; their last third is trained."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        length = int(random.integers(9, most))
        trained = np.arange(length) >= length - length // 3
        yield random.integers(3, 300, length).astype(np.int32), trained


@pytest.fixture
def probed(lively):
    """A model with probes that some steps of Adam have moved, and that run's optimizer."""
    model = Llama(read_config(lively))
    load_hf(model, lively)
    parameters = put_probes(model, rank=4, seed=1)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for sequence in some(40, seed=9):
        gradient = influence.gradient(model, parameters, sequence, CPU)
        parts = gradient.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    return model, parameters, optimizer


def moments(optimizer, parameters):
    states = [optimizer.state[p] for p in parameters]
    return (influence.flat([s[name] for s in states]) for name in ("exp_avg", "exp_avg_sq"))


def ranks(values):
    return np.argsort(np.argsort(values)).astype(float)


def test_scores_rank_candidates_as_real_steps_of_adam_do(probed):
    """30 candidates, one step each of torch's Adam from one state: the drop of a query's loss.

    By the drop, the inner product; by the drop over the step's length, the cosine, projected, too.
    Adam's bias correction, which LESS leaves out, is undone by a step count of a million.
    """
    model, parameters, optimizer = probed
    rate, candidates, (query,) = 1e-4, list(some(30)), some(1, seed=5)
    m, v = moments(optimizer, parameters)
    g_query = influence.gradient(model, parameters, query, CPU)
    before, loss = [p.detach().clone() for p in parameters], answer_losses(model, [query], CPU)
    drops, lengths, steps = [], [], []
    for candidate in candidates:
        g = influence.gradient(model, parameters, candidate, CPU)
        steps.append(influence.adam_step(g, m, v))
        stepper = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8)
        stepper.load_state_dict(optimizer.state_dict())
        stepper.param_groups[0]["lr"] = rate
        for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
            stepper.state[p] = {k: t.clone() for k, t in stepper.state[p].items()}
            stepper.state[p]["step"].fill_(1e6)
        stepper.step()
        drops.append((loss - answer_losses(model, [query], CPU)).item())
        with torch.no_grad():
            moved = [p - old for p, old in zip(parameters, before, strict=True)]
            lengths.append(influence.flat(moved).norm().item())
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
    inner = [(g_query @ step).item() for step in steps]
    cosines = [torch.cosine_similarity(g_query, step, dim=0).item() for step in steps]
    both = influence.project(torch.stack([g_query, *steps]), 8192, seed=3)
    projected = torch.cosine_similarity(both[:1], both[1:]).numpy()
    per_length = np.array(drops) / lengths
    # The projection's noise, 1 / √8192, is as large as the differences of neighbouring cosines.
    pairs = ((drops, inner, 0.99), (per_length, cosines, 0.99), (per_length, projected, 0.9))
    for truth, scores, least in pairs:
        assert np.corrcoef(ranks(truth), ranks(scores))[0, 1] > least
    # To first order the drop is rate · ⟨g_q, Γ⟩ itself.
    slope = np.dot(drops, inner) / np.dot(inner, inner)
    assert slope == pytest.approx(rate, rel=0.01)


def test_projected_inner_products_are_within_the_predicted_error():
    """For signs, the variance of ⟨Pa, Pb⟩ is (|a|²|b|² + ⟨a, b⟩² - 2 Σ a²b²) / d: 200 pairs.

    Their mean square, in these units, is 1 within 5 √(2 / 200); P does not change with the batch.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 200, 9001, generator=generator) + 0.5  # so that blocks are alike
    d = 256
    projected_a, projected_b = (influence.project(x, d, seed=7) for x in (a, b))
    exact, approximate = (a * b).sum(1), (projected_a * projected_b).sum(1)
    variance = (a.norm(dim=1) * b.norm(dim=1)) ** 2 + exact**2 - 2 * (a * a * b * b).sum(1)
    errors = (approximate - exact) / (variance / d).sqrt()
    assert errors.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 200))
    assert abs(errors.mean().item()) < 5 / math.sqrt(200)
    alone = influence.project(a[3:4], d, seed=7)
    assert torch.allclose(alone, projected_a[3:4], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(influence.project(a[3:4], d, seed=8), alone, atol=1)


def test_a_probe_changes_nothing_until_it_is_trained(lively):
    """Its gradient is that of the weight times Aᵀ, from autograd on the plain model."""
    plain, probed = (Llama(read_config(lively)) for _ in range(2))
    for model in (plain, probed):
        load_hf(model, lively)
    parameters = put_probes(probed, rank=4, seed=1)
    (sequence,) = some(1)
    own = answer_losses(probed, [sequence], CPU)
    assert torch.equal(own, answer_losses(plain, [sequence], CPU))
    weight = plain.model.layers[1].mlp.up_proj.weight
    full = influence.gradient(plain, [weight], sequence, CPU).view_as(weight)
    probe = probed.model.layers[1].mlp.up_proj
    ours = influence.gradient(probed, [probe.B], sequence, CPU).view_as(probe.B)
    # Sums of some 60 terms in another order.
    assert torch.allclose(ours, full @ probe.A.T, rtol=1e-4, atol=1e-6)
    assert len(parameters) == 14  # seven in each of two blocks
