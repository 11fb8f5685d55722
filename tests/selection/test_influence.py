"""LESS's parts against what they stand for: real steps of Adam, and exact inner products."""

import math
import shutil

import numpy as np
import pytest
import torch

from adapted import Reference
from checkpoint.config import read_config
from checkpoint.weights import load_hf
from model import Llama
from program.errors import InputError
from program.ranks import start
from prune import PruneConfig
from selection import influence
from selection.embeddings import answer_losses
from tokens.documents import Documents
from tokens.records import encode_conversation

CPU = torch.device("cpu")


def some(count, seed=0, most=60):
    """Random conversations; their last third is trained."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        length = int(random.integers(9, most))
        trained = np.arange(length) >= length - length // 3
        yield random.integers(3, 300, length).astype(np.int32), trained


def akin(query, count):
    """Random conversations, the k-th of which ends like the query by a share of k / count."""
    random = np.random.default_rng(1)
    for k, (ids, trained) in enumerate(some(count)):
        shared = min(len(ids), len(query[0]))
        same = random.random(shared) < k / count
        ids[-shared:][same] = query[0][-shared:][same]
        yield ids, trained


def adapted(folder, **flags):
    """A model with LESS's adapters of rank 4, as prune.py makes it; their dropout."""
    config = PruneConfig(lora_rank=4, seed=1, dtype="float32", **flags)
    with torch.device("meta"):
        model = Llama(read_config(folder))
    dropout = influence.put_adapters(model, config)
    model.to_empty(device="cpu")
    load_hf(model, folder)
    return model, dropout


@pytest.fixture
def warm(lively):
    """A model whose adapters some steps of Adam have moved, and that run's optimizer."""
    model, dropout = adapted(lively)
    dropout.share, parameters = 0.0, influence.trained_parameters(model)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    sequences = list(some(32 * 8, seed=9))
    for k in range(0, len(sequences), 8):
        batch = sequences[k : k + 8]
        gradient = sum(influence.gradient(model, parameters, one, CPU) for one in batch) / 8
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


def test_scores_rank_candidates_as_real_steps_of_adam_do(warm):
    """30 candidates, one step each of torch's Adam from one state: the drop of a query's loss.

    By the drop, the inner product; by the drop over the step's length, the cosine, projected, too.
    Adam's bias correction, which LESS leaves out, is undone by a step count of a million.
    """
    model, parameters, optimizer = warm
    rate, (query,) = 1e-4, some(1, seed=5)
    candidates = list(akin(query, 30))
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
    vectors, d = torch.stack([g_query, *steps]), 3 * 8192
    both = torch.cat([influence.project(vectors, d // 3, seed=k) for k in range(3)], dim=1)
    projected = torch.cosine_similarity(both[:1], both[1:]).numpy()
    per_length = np.array(drops) / lengths
    # Noise of the projection, 1 / √d, of half the cosines' spread takes a correlation of 1 to 0.9.
    assert np.std(cosines) > 3 / d**0.5
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


def test_gradients_of_all_batches_lie_in_one_buffer(warm, monkeypatch):
    """Two of five sequences at a time: three projections of the same memory, as if of all at once.

    A second buffer, while the first is still held, would double what they take.
    """
    model, parameters, _ = warm
    config, sequences = PruneConfig(lora_rank=4, projection=64, dtype="float32"), list(some(5))
    expected = influence.directions(model, sequences, config, CPU)
    project, seen = influence.project, []

    def watched(vectors, *args):
        seen.append((vectors.untyped_storage().data_ptr(), len(vectors)))
        return project(vectors, *args)

    monkeypatch.setattr(influence, "project", watched)
    size = 4 * sum(p.numel() for p in parameters)
    monkeypatch.setattr(influence, "GRADIENT_BYTES", {"cpu": 2 * size})
    found = influence.directions(model, sequences, config, CPU)
    assert [count for _, count in seen] == [2, 2, 1]
    assert len({place for place, _ in seen}) == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32, in another order


def test_gradients_are_those_of_adapters_in_transformers_model(warm, lively):
    """A and B of the four projections of attention in each of two blocks, at LESS's scale of 4."""
    model, parameters, _ = warm
    (sequence,) = some(1)
    reference = Reference(lively, model, 4.0)
    ids, trained = map(torch.tensor, sequence)
    logits = reference.logits(ids.long())[:-1][trained[1:]]
    loss = torch.nn.functional.cross_entropy(logits, ids[trained].long())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    theirs = torch.autograd.grad(loss, [reference.halves[name] for name in names])
    ours = influence.gradient(model, parameters, sequence, CPU)
    # fp32 in another order: cancelled sums of terms as large as the largest.
    expected = influence.flat(theirs)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    projections = {name.split(".")[-3] for name in names}
    assert (len(names), projections) == (16, set(influence.ADAPTED))
    halves = ours.split([p.numel() for p in parameters])
    assert all(half.norm() > 1e-3 * ours.norm() / 16 for half in halves)  # A's, too: B has moved


@pytest.fixture
def data(lively, conversations, tmp_path):
    """Conversations as the warm-up reads them."""
    shutil.copy(conversations, tmp_path / "data.jsonl")
    return Documents([tmp_path / "data.jsonl"], lively, 2048, encode_conversation)


def warmed(lively, data, folder, **flags):
    """(parameters before, after, their dropout, checkpoints) of a warm-up on all of the data."""
    model, dropout = adapted(lively)
    parameters = influence.trained_parameters(model)
    before = [p.detach().clone() for p in parameters]
    flags = {"warmup_share": 1.0, "warmup_epochs": 3, "warmup_lr": 1e-3} | flags
    config = PruneConfig(lora_rank=4, seed=1, dtype="float32", **flags)
    start()
    folder.mkdir()
    influence.warm_up(model, dropout, data, config, folder, CPU)
    paths = influence.checkpoints(folder, config)
    return before, parameters, dropout, [influence.load_checkpoint(p, parameters) for p in paths]


def test_the_warm_up_trains_both_halves_with_dropout_that_scoring_has_not(
    lively, data, tmp_path, monkeypatch
):
    """A and B move; without dropout elsewhere; the mean rates are the schedule's."""
    before, after, dropout, states = warmed(lively, data, tmp_path / "one")
    assert dropout.share == 0
    assert all(state.keys() == {"rate", "m", "v"} for state in states)  # no adapters a second time
    assert all(not torch.equal(p, old) for p, old in zip(after, before, strict=True))
    assert [state["rate"] for state in states] == [
        0,
        1e-3,
        5e-4,
    ]  # an update each, the first warms up
    monkeypatch.setattr(influence, "DROPOUT", 0.0)
    _, without, _, _ = warmed(lively, data, tmp_path / "two")
    assert not torch.allclose(influence.flat(after), influence.flat(without), rtol=0, atol=1e-4)


def test_at_the_start_the_gradient_of_A_is_zero(lively):
    """B is zero there, and A's gradient is Bᵀ times the product's: why there is a warm-up."""
    model, dropout = adapted(lively)
    dropout.share = 0.0
    parameters = influence.trained_parameters(model)
    (sequence,) = some(1)
    parts = influence.gradient(model, parameters, sequence, CPU).split(
        [p.numel() for p in parameters]
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, part in zip(names, parts, strict=True):
        assert (part.norm() == 0) == ("lora_A" in name)


@pytest.mark.parametrize(
    "given, rank", [(None, 16), (3, 3), (17, "at most 16"), (0, "an integer from 1 up")]
)
def test_the_rank_is_lesss_where_the_model_is_wide_enough(given, rank, base):
    """128, else the narrowest projection's width; a higher one is refused."""
    flags = PruneConfig(lora_rank=given)
    if isinstance(rank, str):
        with pytest.raises(InputError, match=f"--lora-rank is {given}, expected {rank}"):
            influence.with_rank(flags, read_config(base))
    else:
        assert influence.with_rank(flags, read_config(base)).lora_rank == rank


def test_adapters_in_fp32_compute_with_weights_in_bf16(lively):
    """Gradients are fp32, and those of fp32 weights up to bf16's rounding of 2⁻⁸."""
    (sequence,) = some(1)
    gradients = []
    for dtype in ("float32", "bfloat16"):
        with torch.device("meta"):
            model = Llama(read_config(lively))
        dropout = influence.put_adapters(model, PruneConfig(lora_rank=4, dtype=dtype))
        dropout.share = 0.0
        model.to_empty(device="cpu")
        load_hf(model, lively)
        parameters = influence.trained_parameters(model)
        gradients.append(influence.gradient(model, parameters, sequence, CPU))
        assert gradients[-1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
