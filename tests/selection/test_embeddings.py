"""Embeddings and perplexities of packed rows, against transformers one conversation at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint.config import read_config
from checkpoint.weights import load_hf
from model import Llama
from selection.embeddings import embeddings, ifd, perplexity, without_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(lively):
    model = Llama(read_config(lively))
    load_hf(model, lively)
    return model, AutoModelForCausalLM.from_pretrained(lively, dtype=torch.float64)


def sequences():
    """Conversations of 1 to 301 tokens with some trained spans; past 256, where bf16 would fail."""
    random = np.random.default_rng(3)
    for length in (2, 37, 301, 7, 101):
        trained = random.random(length) < 0.4
        trained[0], trained[-1] = False, True
        yield random.integers(3, 300, length).astype(np.int32), trained


def test_packed_embeddings_are_one_by_one_and_transformers(models):
    """(1) written out in fp64 on hidden_states[-1], which is after the last norm."""
    model, theirs = models
    row = list(sequences())
    ours = embeddings(model, row, CPU)
    for own, sequence in zip(ours, row, strict=True):
        ids = torch.from_numpy(sequence[0]).long()
        with torch.no_grad():
            hidden = theirs(ids[None], output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1, len(ids) + 1, dtype=torch.float64)
        expected = (weights[:, None] * hidden).sum(0) / weights.sum()
        # Unit vectors; fp32 activations are off by some 1e-6 after two blocks.
        assert torch.allclose(own.double(), expected / expected.norm(), atol=1e-5)
        assert torch.allclose(own, embeddings(model, [sequence], CPU)[0], atol=1e-5)
    uniform = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert not torch.allclose(ours[-1].double(), uniform, atol=1e-3)  # the weights matter


def test_perplexity_and_ifd_are_transformers(models):
    """Of the trained tokens, after the prompt, and alone after BOS."""
    model, theirs = models
    row = list(sequences())

    def expected(ids, trained):
        ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            logps = theirs(ids[None]).logits[0, :-1].log_softmax(-1)
        nll = -logps.gather(1, ids[1:, None])[:, 0]
        return nll[torch.from_numpy(trained)[1:]].mean().exp().item()

    after = [expected(*sequence) for sequence in row]
    alone = [expected(*without_prompt(*sequence)) for sequence in row]
    # A mean nll of fp32 logits, some 1e-5 off, in the exponent.
    assert perplexity(model, row, CPU).tolist() == pytest.approx(after, rel=1e-4)
    ratios = [a / b for a, b in zip(after, alone, strict=True)]
    assert ifd(model, row, CPU).tolist() == pytest.approx(ratios, rel=1e-4)


def test_an_answer_alone_keeps_bos_and_the_trained_tokens():
    """All of them trained, but for BOS."""
    ids = np.array([1, 5, 6, 7, 2], np.int32)
    alone, trained = without_prompt(ids, np.array([False, False, True, False, True]))
    assert (alone.tolist(), trained.tolist()) == ([1, 6, 2], [False, True, True])
