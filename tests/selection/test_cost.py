"""FLOPs of scoring, against figures worked out by hand and against the probes themselves."""

from types import SimpleNamespace

import pytest

from checkpoint.config import read_config
from model import Llama, LlamaConfig
from selection.cost import probe_numbers, scoring_flops
from selection.probe import put_probes
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


@pytest.mark.parametrize("rank", [3, 16])
def test_less_is_two_forward_passes_a_checkpoint_and_the_projection(base, rank):
    """D is what the probes have: with rank 16, no less than the narrowest projection."""
    config = read_config(base)
    numbers = sum(p.numel() for p in put_probes(Llama(config), rank, seed=0))
    assert probe_numbers(config, rank) == numbers
    flags = SimpleNamespace(warmup_epochs=4, warmup_share=0.05, probe_rank=rank, projection=512)
    passes = 2 * (model_flops(config, [30, 7], 10) // 3) * 4.2
    expected = round(passes) + 4 * 2 * 2 * 512 * numbers
    assert scoring_flops(config, "less", [30, 7], 10, flags) == expected


def test_perplexity_has_the_head_and_ifd_the_answers_twice(base):
    """A head of 2·V·E a trained token; half of the tokens trained are half a forward pass more."""
    config = read_config(base)
    rds, perplexity, ifd = (
        scoring_flops(config, m, [40, 40], 40) for m in ("rds", "perplexity", "ifd")
    )
    assert perplexity - rds == 2 * 361 * 32 * 40
    assert perplexity < ifd < 2 * perplexity
