"""data.py: records to updates, updates to packed rows; and what it shows, run alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from conftest import ROOT
from data import (
    Documents,
    best_fit_decreasing,
    encode_conversation,
    pack_row,
    plan_rows,
    update_count,
    update_members,
)
from dpo import DPOConfig
from kernels.attention_tiles import attention_tiles
from model import Llama, LlamaConfig
from pairs import chat
from sft import SFTConfig
from tokens.report import highlight, print_lengths
from tokens.tokenizer import Tokenizer
from training.update import model_flops

PROPERTY = {"derandomize": True, "deadline": None, "database": None, "max_examples": 100}


def tulu_like_lengths(mean, n, most=8192):
    """Log-normal lengths as long-tailed as the mixture's, cut as --max-seq-len cuts them."""
    sigma = 1.0  # the mean of a log-normal is exp(mu + sigma²/2)
    values = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, n)
    return np.clip(values.astype(int), 10, most)


# ---- Packing


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(**PROPERTY)
@given(LENGTHS, st.integers(1, 5), st.integers(300, 900))
def test_a_plan_is_a_partition(lengths, ranks, row_tokens):
    """Every document once, no row over the limit, none empty but to make ranks even."""
    plan = plan_rows(np.array(lengths), ranks, row_tokens, 64)
    assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
    everything = [i for rows in plan for row in rows for i in row]
    assert sorted(everything) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_tokens for rows in plan for row in rows)
    needed = [sum(1 for row in rows if row) for rows in plan]
    assert max(needed) == len(plan[0])


@settings(**PROPERTY)
@given(LENGTHS, st.integers(2, 5))
def test_costs_of_ranks_differ_by_one_document_at_most(lengths, ranks):
    """What dealing the costliest first guarantees: n + n²/12E a document."""
    E = 64
    costs = [n + n * n / (12 * E) for n in lengths]
    plan = plan_rows(np.array(lengths), ranks, 900, E)
    shares = [sum(costs[i] for row in rows for i in row) for rows in plan]
    assert max(shares) - min(shares) <= max(costs) + 1e-6


def test_a_ranks_cost_is_what_the_model_computes():
    """One long document against short ones: the other rank gets as many of them as cost the same.

    By the FLOPs of a block with 7B's proportions (an MLP of 8/3 of the hidden size): 144 tokens
    cost as much as 30.9 times 12, by n + n²/12E 432 against 14. By tokens it would be 12 times, by
    their squares 144, by n + n²/24E 22.2 and by n + n²/6E 45.
    """
    E = 6
    config = LlamaConfig(10, E, 8 * E // 3, 1, 1, 1, E, 1e-5, 1e4, False)
    ratio = model_flops(config, [144], 0) / model_flops(config, [12], 0)
    assert ratio == pytest.approx(432 / 14)
    first, second = plan_rows(np.array([144] + [12] * 32), 2, 1000, E)
    assert sorted(sum(second, [])) == list(range(1, 32)) and len(sum(second, [])) == 31 > ratio
    assert sorted(sum(first, [])) == [0, 32]


def test_an_update_of_tulu_is_spread_evenly():
    """128 conversations over 8 ranks: no rank does 3 % more than the mean."""
    for seed in range(10):
        lengths = np.random.default_rng(seed).permutation(tulu_like_lengths(490, 2000))[:128]
        costs = lengths + lengths**2 / (12 * 4096)
        plan = plan_rows(lengths, 8, 16384, 4096)
        shares = [sum(costs[i] for row in rows for i in row) for rows in plan]
        # The smallest documents, dealt last, even out what is left: about a 1,000th of a share
        # each. A single document over the mean could not be split.
        assert max(shares) <= max(1.03 * costs.sum() / 8, costs.max() + 1)


@pytest.mark.parametrize("mean", [490, 1097])
@pytest.mark.parametrize("row_tokens", [8192, 16384])
def test_rows_are_over_99_percent_full(mean, row_tokens):
    """All but the last, for as many documents as the mixture has; a second each."""
    lengths = tulu_like_lengths(mean, 326_154)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    rows = best_fit_decreasing(lengths, longest_first, row_tokens)
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert sum(map(len, rows)) == len(lengths) and filled[-1] <= row_tokens
    assert lengths.sum() / (len(rows) * row_tokens) > 0.99
    assert filled[1] > 0.99 * row_tokens


def test_best_fit_takes_the_fullest_row_that_has_room():
    """6, 5, 4, 3, 2 into rows of 10: 6 + 4 and 5 + 3 + 2."""
    lengths = np.array([6, 5, 4, 3, 2])
    assert best_fit_decreasing(lengths, range(5), 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing(lengths[:0], [], 10) == []


def documents_of(*pairs):
    return [(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in pairs]


def test_a_packed_row_written_out():
    """The example of pack_row's docstring, with its types."""
    row = pack_row(documents_of(([1, 7, 8, 2], [0, 0, 1, 1]), ([1, 9, 2], [0, 0, 1])))
    expected = {
        "input_ids": (np.int64, [1, 7, 8, 2, 1, 9, 2]),
        "positions": (np.int64, [0, 1, 2, 3, 0, 1, 2]),
        "doc_start": (np.int32, [0, 0, 0, 0, 4, 4, 4]),
        "doc_end": (np.int32, [4, 4, 4, 4, 7, 7, 7]),
        "predict": (np.int64, [1, 2, 5]),
        "labels": (np.int64, [8, 2, 2]),
    }
    tiles = row.pop("tiles")
    assert np.array_equal(tiles, attention_tiles(row["doc_start"], row["doc_end"]))
    assert {name: (a.dtype.type, a.tolist()) for name, a in row.items()} == expected


def test_a_packed_pair_written_out():
    """The other example: the prompt once, and rejected goes on from it; a document before it."""
    pair = ([1, 5, 8, 6, 2], [0, 0, 1, 1, 1]), ([1, 5, 9, 2], [0, 0, 1, 1])
    row = {name: a.tolist() for name, a in pack_row(documents_of(*pair), np.array([0, 2])).items()}
    expected = {
        "input_ids": [1, 5, 8, 6, 2, 9, 2],
        "positions": [0, 1, 2, 3, 4, 2, 3],
        "doc_start": [0, 0, 0, 0, 0, 0, 0],
        "doc_end": [7, 7, 5, 5, 5, 7, 7],
        "predict": [1, 2, 3, 1, 5],
        "labels": [8, 6, 2, 9, 2],
    }
    assert {name: row[name] for name in expected} == expected
    row = pack_row(documents_of(([1, 4, 2], [0, 0, 1]), *pair), np.array([0, 0, 2]))
    assert row["doc_start"].tolist() == [0] * 3 + [3] * 7
    assert row["doc_end"].tolist() == [3] * 3 + [n + 3 for n in expected["doc_end"]]
    assert row["predict"].tolist() == [1] + [n + 3 for n in expected["predict"]]


def test_an_empty_row_is_one_token_that_predicts_nothing():
    """It fills up a rank that has fewer rows than the others."""
    row = {name: a.tolist() for name, a in pack_row([]).items()}
    assert (row.pop("tiles"), row.pop("positions")) == ([[[0, 1, 0, 1], [0] * 4]] * 2, [0])
    assert row == {"input_ids": [0], "doc_start": [0], "doc_end": [1], "predict": [], "labels": []}


@settings(**PROPERTY)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_packed_row_holds_its_documents(masks):
    """Every trained token is predicted from the one before it, in its own document; tokens begin
    where doc_start says."""
    masks = [[False, *mask] for mask in masks]
    ids = [[100 * d + k for k in range(len(mask))] for d, mask in enumerate(masks)]
    row = pack_row(documents_of(*zip(ids, masks, strict=True)))
    assert row["input_ids"].tolist() == sum(ids, [])
    assert row["input_ids"][row["doc_start"]].tolist() == [100 * (i // 100) for i in sum(ids, [])]
    trained = [
        i for d, mask in zip(ids, masks, strict=True) for i, m in zip(d, mask, strict=True) if m
    ]
    assert row["labels"].tolist() == trained
    assert row["input_ids"][row["predict"]].tolist() == [i - 1 for i in trained]


@settings(**PROPERTY)
@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3, st.booleans()), min_size=1, max_size=5))
def test_in_a_packed_row_an_answer_sees_its_prompt_and_itself(sizes):
    """Token by token: what each sees, in order, is its own sequence up to itself, at its places."""
    sequences, shared = [], []
    for number, (prompt, *answers, together) in enumerate(sizes):
        for side, answer in enumerate(answers):
            head = [100 * number + n for n in range(prompt)]
            tail = [100 * number + 50 * (side + 1) + n for n in range(answer)]
            sequences.append((head + tail, [0] * prompt + [1] * answer))
            shared.append(prompt if together and side else 0)
    row = pack_row(documents_of(*sequences), np.array(shared))
    i, j = np.arange(len(row["input_ids"]))[:, None], np.arange(len(row["input_ids"]))
    sees = (row["doc_start"][:, None] <= j) & (j <= i) & (i < row["doc_end"])
    read = [row["input_ids"][sees[n]].tolist() for n in range(len(j))]
    own = [range(a, len(ids)) for (ids, _), a in zip(sequences, shared, strict=True)]
    assert read == [
        ids[: n + 1] for (ids, _), places in zip(sequences, own, strict=True) for n in places
    ]
    assert row["positions"].tolist() == [len(ids) - 1 for ids in read]
    trained = [ids[: n + 1] for ids, mask in sequences for n, m in enumerate(mask) if m]
    assert [read[n] for n in row["predict"]] == [ids[:-1] for ids in trained]
    assert row["labels"].tolist() == [ids[-1] for ids in trained]


def test_positions_of_a_packed_row_restart(monkeypatch):
    """From pack_row to the rotary embedding: the positions themselves, which no loss can see."""
    seen = []

    def spy(positions, config, dtype):
        seen.append(positions.tolist())
        return torch.ones(len(positions), 1, 4), torch.zeros(len(positions), 1, 4)

    monkeypatch.setattr("model.rotary_angles", spy)
    config = LlamaConfig(10, 8, 8, 1, 2, 2, 4, 1e-5, 1e4, False)
    row = pack_row(documents_of(([1, 7, 8], [0, 0, 1]), ([1], [0]), ([1, 2], [0, 1])))
    row = {name: torch.from_numpy(array) for name, array in row.items()}
    Llama(config)(**row)
    Llama(config)(*(row[name] for name in ("input_ids", "doc_start", "predict")))  # made there
    assert seen == [[0, 1, 2, 0, 0, 1]] * 2


# ---- Updates


def test_the_mixture_gives_the_originals_number_of_updates():
    """326,154 conversations in batches of 128: 2,548 an epoch, 5,096 in two."""
    assert update_count(326_154, 128, 2) == (2548, 5096)
    assert update_count(256, 128, 3) == (2, 6)
    assert update_count(255, 128, 3) == (1, 3)


@pytest.mark.parametrize(
    "records, kind, batch_size, epochs, text",
    [
        (326_154, "conversations", 128, 2, "5,096 updates of 128 conversations, 2,548 an epoch; "
         "10 of the 326,154 conversations are left out of each epoch"),
        (7, "conversations", 4, 2, "2 updates of 4 conversations, 1 an epoch; "
         "3 of the 7 conversations are left out of each epoch"),
        (33, "pairs", 32, 1, "1 update of 32 pairs, 1 an epoch; "
         "1 of the 33 pairs is left out of each epoch"),
        (8, "pairs", 4, 3, "6 updates of 4 pairs, 2 an epoch"),
        (2, "conversations", 128, 1, "1 update of 2 conversations, 1 an epoch"),
        (1, "pairs", 1, 1, "1 update of 1 pair, 1 an epoch"),
    ],
)  # fmt: skip
def test_what_is_left_out_of_every_epoch_is_said(records, kind, batch_size, epochs, text):
    """In the line that tells the updates, in the singular where it is one."""
    assert data.schedule(records, kind, batch_size, epochs) == text


def test_an_epoch_is_a_permutation_less_its_last_partial_batch():
    """10 documents in threes: nine of them once, others left out in the next epoch."""
    epochs = []
    for step in range(0, 12, 3):
        batches = [update_members(10, 3, 42, step + k) for k in range(3)]
        assert [epoch for epoch, _ in batches] == [step // 3] * 3
        members = np.concatenate([members for _, members in batches])
        assert len(members) == 9 and len(set(members)) == 9 and set(members) <= set(range(10))
        epochs.append(tuple(members))
    assert len(set(epochs)) == 4


def test_order_depends_on_seed_and_epoch_alone():
    """Whatever the batch size, the number of epochs or what was asked for before."""

    def order(seed, epoch, batch):
        per_epoch, _ = update_count(24, batch, 1)
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        return np.concatenate([update_members(24, batch, seed, s)[1] for s in steps]).tolist()

    assert order(1, 1, 4) == order(1, 1, 6) == order(1, 1, 24)
    assert len({tuple(order(seed, epoch, 4)) for seed in (0, 1, 2) for epoch in (0, 1)}) == 6
    assert order(0, 1, 4) == order(0, 1, 4)


def test_fewer_conversations_than_a_batch_are_one_update_an_epoch():
    """All of them, each time."""
    assert update_count(5, 128, 2) == (1, 2)
    for step in (0, 1):
        epoch, members = update_members(5, 128, 42, step)
        assert epoch == step and sorted(members) == [0, 1, 2, 3, 4]


# ---- Run alone


def test_highlighting_tells_trained_tokens_apart(base):
    """The whole text, with BOS and EOS, trained spans in brackets."""
    tokenizer = Tokenizer(base)
    ids, trained = tokenizer.encode(chat("q", "é", "q", "b")["messages"])
    shown = highlight(tokenizer, np.array(ids), np.array(trained))
    assert shown == ("<s> <|user|>\nq\n<|assistant|>\n⟦é</s>⟧\n<|user|>\nq\n<|assistant|>\n⟦b</s>⟧")


def test_the_histogram_of_lengths_counts_powers_of_two(capsys):
    """A length of 8 belongs to ≤ 8, one of 9 to ≤ 16; mean and percentiles stand above."""
    print_lengths(np.array([1, 2, 3, 4, 5, 8, 9]))
    first, *bars = capsys.readouterr().out.splitlines()
    assert "mean 5; percentiles" in first and "50 %: 4," in first and first.endswith("100 %: 9")
    counts = [tuple(map(int, bar.split()[1:3])) for bar in bars]
    assert counts == [(1, 1), (2, 1), (4, 2), (8, 2), (16, 1)]
    assert [bar.count("█") for bar in bars] == [25, 25, 50, 50, 25]


def test_what_data_py_says_of_rows_and_turns(base, conversations, capsys):
    """Where everything fits into one row: how full it is, an update's, and what padding costs."""
    flags = {"model": str(base), "data": [str(conversations)], "batch_size": 8, "show": 1}
    data.main(flags | {"micro_tokens": 10_000})
    shown = capsys.readouterr().out
    documents = Documents([conversations], base, 8192, encode_conversation)
    total = documents.lengths.sum()
    assert f"24 conversations, {total:,} tokens, " in shown
    assert f"{documents.turns.sum()} assistant turns, {documents.turns.sum() / 24:.2f} a" in shown
    assert f"rows of 10,000 tokens: {total / 10_000:.2%} full over all the data" in shown
    assert f"8 conversations takes 1.0 rows on one rank, {total / 3 / 10_000:.1%} full" in shown
    batches = [documents.lengths[update_members(24, 4, 42, step)[1], 0] for step in range(6)]
    useful = total / sum(4 * max(batch) for batch in batches)
    assert f"(padded to the longest of 4: {useful:.0%} useful)" in shown
    assert "6 updates of 8 conversations, 3 an epoch\n" in shown
    assert f"{conversations}:1 (id made-up-0), {documents.lengths[0, 0]} tokens:\n<s> " in shown
    assert f"{conversations}:2" not in shown


def test_data_py_shows_the_longest_the_shortest_and_another(base, conversations, capsys):
    """By --seed; of one of more than 2,000 tokens the middle is left out."""
    flags = {"model": str(base), "data": [str(conversations)], "batch_size": 8}
    shown = []
    for seed in (0, 0, 1):
        data.main(flags | {"seed": seed, "epochs": 3})
        shown.append(capsys.readouterr().out)
    documents = Documents([conversations], base, 8192, encode_conversation)
    lengths = documents.lengths[:, 0]
    for title, i in (("longest", lengths.argmax()), ("shortest", lengths.argmin())):
        place = f"{conversations}:{i + 1} (id made-up-{i})"
        assert f"\n{title}: {place}, {lengths[i]} tokens:\n<s> " in shown[0]
    assert "9 updates of 8 conversations, 3 an epoch\n" in shown[0]
    others = [text[text.index("\nrandom: ") :] for text in shown]
    assert others[0] == others[1] != others[2]
    ids, trained = np.arange(300).repeat(10) % 300 + 3, np.zeros(3000, bool)
    text = highlight(Tokenizer(base), ids, trained)
    assert "\n… 1,000 tokens …\n" in text


def test_data_py_counts_the_updates_of_the_loops(base, conversations, preferences, capsys):
    """Epochs and batches are, unless told, sft.py's for conversations and dpo.py's for pairs."""
    for path, loop in ((conversations, SFTConfig()), (preferences, DPOConfig())):
        shown = []
        for flags in ({}, {"epochs": loop.epochs, "batch_size": loop.batch_size}):
            data.main({"model": str(base), "data": [str(path)], "show": 0} | flags)
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] and f"{loop.epochs} updates of " in shown[0]


def test_data_py_says_what_the_plan_says(base, conversations):
    """With --gpu: the words of plan.py on these data, beside what they are."""
    command = [sys.executable, "data.py", "--model", str(base), "--data", str(conversations)]
    done = subprocess.run(
        [*command, "--gpu", "h100", "--gpus", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "SFT on 2 x H100" in done.stdout and "an update:" in done.stdout
