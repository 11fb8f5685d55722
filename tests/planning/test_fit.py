"""fit.py: as few recomputed blocks as fit, and advice that holds."""

import dataclasses
import re

import pytest

from plan import read_model
from planning import fit
from planning.memory import Layout, memory
from program.errors import InputError

SMALL = dataclasses.replace(read_model("7b"), num_hidden_layers=5)
CASES = [
    ("7b", Layout(ranks=1), 78.5),
    ("7b", Layout(ranks=16, replicas=8, recompute=0), 78.5),
    ("34b", Layout(ranks=8, recompute=48), 78.5),
    ("70b", Layout(ranks=8, recompute=80), 78.5),
    ("70b", Layout(ranks=1, recompute=80), 23.0),
]


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_fewest_blocks_are_recomputed(compile, ranks):
    """As trying all of them from none on finds; None where all are not enough."""
    layout = Layout(ranks=ranks, compile=compile, reshard=True)
    totals = [
        memory(SMALL, dataclasses.replace(layout, recompute=count))["total"] for count in range(6)
    ]
    assert fit.recompute_needed(SMALL, layout, min(totals) - 0.01) is None
    for available in totals:
        expected = min(count for count in range(6) if totals[count] <= available)
        found = fit.recompute_needed(SMALL, layout, available)
        # Eagerly the first recomputed block holds its input twice: none may take less than one.
        assert found == expected or (not compile and expected == 0 and totals[found] <= available)


@pytest.mark.parametrize(("size", "layout", "available"), CASES, ids=range(len(CASES)))
def test_advice_is_true(size, layout, available):
    """What is proposed fits, and the next smaller step of the same kind does not."""
    config = read_model(size)
    assert memory(config, layout)["total"] > available
    found = fit.changes(config, layout, available)
    assert found
    for text, changed in found:
        assert fit.fits(config, changed, available), text
        if text.startswith("--recompute"):
            less = dataclasses.replace(changed, recompute=changed.recompute - 1)
            assert not fit.fits(config, less, available)
        if re.fullmatch(r"\d+ GPUs?", text):
            fewer = max(count for count in (1, 2, 4, *range(8, 1025, 8)) if count < changed.ranks)
            less = dataclasses.replace(
                changed, ranks=fewer, replicas=1, recompute=config.num_hidden_layers
            )
            assert fewer <= layout.ranks or not fit.fits(config, less, available)
        if text.startswith("--micro-tokens"):
            more = dataclasses.replace(changed, row_tokens=changed.row_tokens + 1024)
            assert more.row_tokens >= layout.row_tokens or not fit.recompute_needed(
                config, more, available
            )


def test_each_kind_of_advice_is_given_somewhere():
    """GPUs, recomputation, replicas, rows, adapters, and NF4 where no one change is enough."""
    texts = " | ".join(
        text
        for size, layout, available in CASES
        for text, _ in fit.changes(read_model(size), layout, available)
    )
    for part in ("GPU", "--recompute", "--replicas", "--micro-tokens", "--lora-rank", "nf4"):
        assert part in texts


def test_refused_with_the_advice():
    """One error that names what is needed, what is there, and each change."""
    with pytest.raises(InputError) as refused:
        fit.check_fits(read_model("7b"), Layout(ranks=1, recompute=32), 78.5)
    assert re.match(r"one GPU needs 1\d\d\.\d GiB .*expected at most 78\.5; ", str(refused.value))
    assert "2 GPUs" in str(refused.value)


def test_a_close_fit_warns():
    """Within 5 % of what is there, and not below that."""
    config, layout = read_model("7b"), Layout(ranks=8, recompute=32)
    total = memory(config, layout)["total"]
    assert "may run out" in fit.check_fits(config, layout, total / 0.96)[1]
    assert fit.check_fits(config, layout, total / 0.94)[1] is None


def test_one_rank_drops_gathered_weights_where_that_saves_recomputation():
    """On an H200 7B then recomputes fewer blocks; where all fits anyway, nothing is dropped."""
    config = read_model("7b")
    tight = fit.fastest(config, Layout(), 139.2)
    kept = fit.recompute_needed(config, Layout(reshard=False), 139.2)
    assert tight.reshard and tight.recompute < kept
    roomy = fit.fastest(config, Layout(), 1000)
    assert roomy.reshard is None and roomy.recompute == 0
    assert fit.fastest(config, Layout(), 50) is None
