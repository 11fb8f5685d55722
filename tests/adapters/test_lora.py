"""lora.py: logits, gradients and updates equal LoRA on transformers' model, and what is trained."""

import pytest
import torch
from safetensors.torch import load_file

from adapted import Reference, adapted
from adapters.lora import PROJECTIONS
from conftest import updates
from data import update_members
from harm import harmed, recipe
from tokens.documents import Documents
from tokens.records import encode_conversation
from training.update import learning_rate

# Two documents in a row, and what is predicted of each.
LENGTHS = (11, 26)


def row():
    """A packed row as the model takes it, seeded."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 361, (sum(LENGTHS),), generator=generator)
    doc_start = torch.tensor([0] * 11 + [11] * 26, dtype=torch.int32)
    predict = torch.tensor([2, 3, 9, 11, 20, 35])
    return ids, doc_start, predict, ids[predict + 1]


def their_losses(reference):
    ids, _, predict, labels = row()
    logits = torch.cat([reference.logits(part) for part in ids.split(LENGTHS)])
    return torch.nn.functional.cross_entropy(logits[predict], labels, reduction="none")


@pytest.mark.parametrize("quantize", [None, "nf4"], ids=str)
def test_losses_and_gradients_are_those_of_adapters_summed_into_transformers_weights(
    wide, quantize
):
    """On the same decoded weights; every A and B has a gradient, and nothing else."""
    model = adapted(wide, stir=True, quantize=quantize)
    reference = Reference(wide, model, 7 / 5, quantize)
    nll, theirs = model(*row()), their_losses(reference)
    weights = torch.tensor([0.3, -1, 2, 0.7, 1, 0.1])
    (nll @ weights).backward()
    (theirs @ weights).backward()
    torch.testing.assert_close(nll, theirs, rtol=1e-5, atol=1e-5)  # fp32 in another order
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name)
        if parameter.requires_grad:
            expected = reference.halves[name].grad
            floor = 1e-5 * expected.abs().max().item()  # cancelled sums of terms as large
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=floor)


def test_adapters_are_on_the_seven_projections_and_start_as_pefts(wide):
    """A is uniform in ±1/√K, B zero: the model starts as its base."""
    model, base = adapted(wide), adapted(wide, lora_rank=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(PROJECTIONS)
    assert all(parameter.requires_grad for parameter in base.parameters())
    for name, parameter in trained.items():
        if "lora_B" in name:
            assert not parameter.any()
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.95 * bound < parameter.abs().max() <= bound  # the largest of 320 and more
            assert abs(parameter.mean()) < 5 * bound / (3 * parameter.numel()) ** 0.5
    assert torch.equal(model(*row()), base(*row()))
    firsts = {tuple(p.flatten()[:3].tolist()) for name, p in trained.items() if "lora_A" in name}
    assert len(firsts) == 14  # each its own


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_weights_are_in_the_type_of_computing_and_adapters_in_fp32(wide, dtype):
    """Or in NF4: a byte for two weights."""
    for quantize in (None, "nf4"):
        model = adapted(wide, dtype=dtype, quantize=quantize)
        for name, parameter in model.named_parameters():
            projection = any(f".{p}." in name for p in PROJECTIONS)
            packed = quantize and projection and ".lora_" not in name
            frozen = torch.uint8 if packed else getattr(torch, dtype)
            assert parameter.dtype == (torch.float32 if ".lora_" in name else frozen)


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_keeps_no_decoded_weight(wide, compiled):
    """Of a quantised projection, it keeps the packed bytes, which are the model's own.

    Compiled, too (by torch's partition into forward and backward, which looks for what to keep).
    """
    kept = []
    model = adapted(wide, quantize="nf4")
    if compiled:
        block = model.model.layers[0]
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=True)
    sizes = {64 * 64, 32 * 64, 192 * 64}  # of the projections' weights
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(*row()).sum().backward()
    assert sum(x.dtype == torch.uint8 for x in kept) >= 14
    assert not [x for x in kept if x.is_floating_point() and x.numel() in sizes]


@pytest.mark.parametrize("quantize, ranks", [(None, 2), ("nf4", 1), ("nf4", 2)], ids=str)
def test_three_updates_equal_a_plain_loop_over_transformers(
    wide, conversations, tmp_path, quantize, ranks
):
    """Losses, norms, A and B, and the merged weights; under a clip as small as AdamW's eps.

    The reason of the clip is in tests/test_sft.py.
    """
    flags = recipe(wide, conversations, tmp_path) | {"batch_size": 7, "max_steps": 3, "lr": 0.1}
    flags |= {"warmup_ratio": 0.2, "clip": 1e-6, "weight_decay": 1.0, "micro_tokens": 1500}
    flags |= {"lora_rank": 5, "lora_alpha": 7.0, "lora_dropout": 0.0, "quantize": quantize}
    assert harmed(flags, ranks=ranks) == 0

    reference = Reference(wide, adapted(wide, seed=42), 7 / 5, quantize)
    halves = list(reference.halves.values())
    documents = Documents([conversations], wide, 8192, encode_conversation)
    optimizer = torch.optim.AdamW(halves, betas=(0.9, 0.95), weight_decay=1)
    for step, record in enumerate(updates(tmp_path)):
        _, members = update_members(len(documents), 7, seed=42, step=step)
        trained = documents.trained_counts[members].sum()
        loss = 0
        for ids, mask in documents.sequences(members):
            ids, mask = torch.tensor(ids.astype("int64")), torch.tensor(mask.astype(bool))
            logits = reference.logits(ids)[:-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            loss = loss + nll[mask[1:]].sum() / trained
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(halves, 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4 * (24 // 7), 0.1, 0.2)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(updates(tmp_path)) == 3
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(reference.halves)
    for name, half in reference.halves.items():
        assert half.detach().abs().max() > 1e-3, "it was trained"
        theirs = saved[f"base_model.model.{name}"]
        torch.testing.assert_close(theirs, half.detach(), rtol=1e-4, atol=1e-6)
    saved = load_file(tmp_path / "model.safetensors")
    theirs = dict(reference.model.named_parameters()) | reference.merged()
    assert saved.keys() == theirs.keys()
    for name, weight in saved.items():
        # Rounding to bf16, which keeps 8 bits, and the differences of A and B above.
        torch.testing.assert_close(weight.float(), theirs[name].detach(), rtol=2**-8, atol=2e-6)
