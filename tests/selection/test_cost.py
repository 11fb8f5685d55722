"""FLOPs of scoring, against figures worked out by hand and against the adapters themselves."""

import pytest

from checkpoint.config import read_config
from model import Llama, LlamaConfig
from prune import PruneConfig
from selection import influence
from selection.cost import adapter_numbers, scoring_flops
from training.update import model_flops

LLAMA_2_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, False)


def test_the_mixture_by_a_7b():
    """Forward: 2 per weight of the blocks and token, and 2·n²·E a layer for QKᵀ and PV, halved."""
    blocks = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096  # without embedding, head and norms
    documents, n = 326_154, 1097
    expected = documents * (2 * blocks * n + 2 * n * n * 4096 * 32)
    flops = scoring_flops(LLAMA_2_7B, "rds", [n] * documents, documents * 400)
    assert flops == expected
    assert flops / 400e12 / 3600 == pytest.approx(3.3, abs=0.05)  # hours, as published


def test_adapters_of_less_are_counted_as_they_are(base):
    """At 7B with LESS's rank, 134 M as LESS says."""
    config = read_config(base)
    model = Llama(config)
    influence.put_adapters(model, PruneConfig(lora_rank=3, dtype="float32"))
    numbers = sum(p.numel() for p in influence.trained_parameters(model))
    assert adapter_numbers(config, 3) == numbers
    assert adapter_numbers(LLAMA_2_7B, 128) == 4 * 32 * 128 * 2 * 4096 == 134_217_728


def test_less_is_two_passes_a_checkpoint_the_adapters_and_the_projection(base):
    """The warm-up's share of both passes, too; 6 a number and token for the adapters."""
    config = read_config(base)
    numbers = adapter_numbers(config, 3)
    flags = PruneConfig(warmup_epochs=4, warmup_share=0.05, lora_rank=3, projection=512)
    passes = 4.2 * (2 * (model_flops(config, [30, 7], 10) // 3) + 6 * numbers * 37)
    expected = round(passes + 4 * 2 * 2 * 512 * numbers)
    assert scoring_flops(config, "less", [30, 7], 10, flags) == expected


def test_less_costs_three_passes_of_training():
    """On the mixture with a 7B: 4 checkpoints · 2 of the 3 parts of a pass, and a tenth on top."""
    flags = influence.with_rank(influence.LessFlags(), LLAMA_2_7B)
    lengths, trained = [1097] * 326_154, 326_154 * 400
    less = scoring_flops(LLAMA_2_7B, "less", lengths, trained, flags)
    assert less / model_flops(LLAMA_2_7B, lengths, trained) == pytest.approx(3, abs=0.3)
    assert less == pytest.approx(4.4e19, rel=0.02)


def test_perplexity_has_the_head_and_ifd_the_answers_twice(base):
    """A head of 2·V·E a trained token; half of the tokens trained are half a forward pass more."""
    config = read_config(base)
    rds, perplexity, ifd = (
        scoring_flops(config, m, [40, 40], 40) for m in ("rds", "perplexity", "ifd")
    )
    assert perplexity - rds == 2 * 361 * 32 * 40
    assert perplexity < ifd < 2 * perplexity
