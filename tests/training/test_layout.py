"""layout.py: what a run asks of planning/ before it loads, and what it does with the answer."""

import dataclasses

import numpy as np
import pytest
import torch
from test_parallel import statuses

import sft
from benchmarks.step import LLAMA_2_7B
from data import plan_rows, update_members
from planning.memory import Layout, memory
from program.errors import InputError
from program.ranks import start
from sft import SFTConfig
from training.layout import choose, lay_out, layout_of, longest_row

ONE = Layout(row_tokens=16384, predicted=16384, rows=2)
MANY = dataclasses.replace(ONE, ranks=8)


class Pairs:
    """Lengths of 23 pairs, as `Documents` gives them."""

    lengths = np.random.default_rng(0).integers(3, 40, (23, 2))
    trained_counts = lengths // 3
    tokens, squares = lengths.sum(1), (lengths**2).sum(1)

    def __len__(self):
        return len(self.lengths)


def total(layout, **changes):
    return memory(LLAMA_2_7B, dataclasses.replace(layout, **changes))["total"]


# ---- The longest row


CONFIG = SFTConfig(dtype="bfloat16", batch_size=5, epochs=3, micro_tokens=150, compile=True)


def the_longest_row():
    _, world, _ = start()
    documents = Pairs()
    for config in (CONFIG, dataclasses.replace(CONFIG, max_steps=2)):
        tokens, trained, rows = [], [], []
        for step in range(config.max_steps or 12):
            _, members = update_members(23, 5, 42, step)
            pairs = documents.lengths[members].sum(1)
            plan = plan_rows(pairs, world, 150, 64, documents.squares[members])
            rows.append(len(plan[0]))
            for row in (row for rows_of_rank in plan for row in rows_of_rank):
                tokens.append(pairs[row].sum())
                trained.append(documents.trained_counts[members[row]].sum())
        expected = {"row_tokens": max(tokens), "predicted": max(trained), "rows": max(rows)}
        assert longest_row(config, 64, documents) == expected


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_longest_row_is_that_of_all_updates_and_ranks(ranks):
    """Its tokens, the most that one trains, the most passes; --max-steps counts."""
    assert statuses(the_longest_row, count=ranks) == [0] * ranks


# ---- How many blocks recompute


@pytest.mark.parametrize("layout", [ONE, MANY], ids=["one GPU", "eight"])
def test_as_few_blocks_recompute_as_leave_a_twentieth_free(layout):
    """From memory for all to memory for none: always the fewest, twice where one GPU frees gathered
    weights on the way, and keeps on doing so; a warning only near the end."""
    last = False, 0
    for available in np.arange(total(layout, recompute=0) / 0.94, 20, -1.7):
        try:
            chosen, line, warning = choose(LLAMA_2_7B, layout, available, None, 8192)
        except InputError:
            break
        needed, limit = memory(LLAMA_2_7B, chosen)["total"], 0.95 * available
        if warning is None:
            assert needed <= limit
            fewer = chosen.recompute - 1
            assert fewer < 0 or total(chosen, recompute=fewer) > limit
        else:
            assert limit < needed <= available and chosen.recompute == 32
        assert line.startswith(f"{chosen.recompute} of 32 blocks recompute")
        assert ("are freed" in line) == (layout is ONE and not chosen.keeps_gathered)
        assert last <= (last := (not chosen.keeps_gathered, chosen.recompute))
    assert last == (True, 32) and warning
    assert choose(LLAMA_2_7B, layout, 999, None, 8192)[0] == layout


def test_one_gpu_frees_gathered_weights_where_that_saves_recomputation():
    """7B on an H200: some blocks fewer recompute. Where all fits, or N is said, they are kept."""
    chosen, _, _ = choose(LLAMA_2_7B, ONE, 139.2, None, 8192)
    assert chosen.reshard and total(chosen, reshard=False) > 0.95 * 139.2
    for recompute in (None, 32):
        assert choose(LLAMA_2_7B, ONE, 999, recompute, 8192)[0].keeps_gathered
    said, _, warning = choose(LLAMA_2_7B, ONE, 139.2, chosen.recompute, 8192)
    assert said == chosen and warning is None


@pytest.mark.parametrize("recompute", [None, 3, 32])
def test_what_cannot_fit_is_refused_with_what_would(recompute):
    """What is needed and there, which flags or GPUs; and what the flag says is never changed."""
    with pytest.raises(InputError, match=r"needs .* expected at most 60.0; .*: 4 GPUs") as error:
        choose(LLAMA_2_7B, ONE, 60.0, recompute, 8192)
    assert f"--recompute {32 if recompute is None else recompute})" in str(error.value)


# ---- Asked by the loops


def pretend_gpu(monkeypatch, gib):
    """A GPU with so much free memory, which nothing may use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * 2**30), 0))
    return torch.device("cuda")


def test_a_gpu_decides_and_says_so_in_one_line(monkeypatch, capsys):
    """Rank 0 prints it; a CPU is asked nothing."""
    start()
    device, documents = pretend_gpu(monkeypatch, 130), Pairs()
    config, reshard = lay_out(CONFIG, LLAMA_2_7B, documents, device)
    out, err = capsys.readouterr()
    assert config.recompute == 0 and reshard is False and err == ""
    assert out.startswith("0 of 32 blocks recompute: ") and out.endswith(" tokens\n")
    # With so little that only all blocks would do, what the flag says still counts, with a warning.
    said = dataclasses.replace(CONFIG, recompute=7)
    layout = dataclasses.replace(
        layout_of(said, **longest_row(said, 4096, documents)), reshard=True
    )
    device = pretend_gpu(monkeypatch, memory(LLAMA_2_7B, layout)["total"] * 1.02)
    config, reshard = lay_out(said, LLAMA_2_7B, documents, device)
    out, err = capsys.readouterr()
    assert config.recompute == 7 and reshard is True
    assert out.startswith("7 of 32 blocks recompute, gathered weights are freed between")
    assert err.startswith("warning: one GPU needs ") and len(err.splitlines()) == 1
    assert lay_out(CONFIG, LLAMA_2_7B, documents, torch.device("cpu")) == (CONFIG, None)


def test_a_run_that_cannot_fit_writes_nothing(monkeypatch, refused):
    """It ends where the data are known, before the output folder is made and a weight is read."""
    device = pretend_gpu(monkeypatch, 0.01)
    monkeypatch.setattr(sft, "start", lambda: (*start()[:2], device))
    assert "one GPU needs 0." in refused() and "expected at most 0.0" in refused()


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"recompute": 3}, r"--recompute is 3, expected 0 to 2, the model's blocks"),
        ({"recompute": -1}, r"--recompute is -1, expected an integer from 0 up"),
        ({"replicas": 2}, r"--replicas is 2, expected a divisor of the 1 rank"),
        ({"replicas": 0}, r"--replicas is 0, expected an integer from 1 up"),
    ],
    ids=str,
)
def test_a_layout_that_the_ranks_or_the_model_do_not_have_is_refused(flags, expected, refused):
    """Naming the flag, before anything is written."""
    assert expected in refused(**flags)
