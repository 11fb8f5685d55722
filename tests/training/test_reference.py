"""reference.py: log-probabilities against transformers', and the reference that is kept."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo
from checkpoint.config import read_config
from checkpoint.reference_file import read_reference, reference_files, write_reference
from checkpoint.weights import weights_key
from harm import cut_short, flip_byte
from model import Llama
from pairs import loaded, their_logps, write
from program import files
from program.errors import RunError
from program.ranks import start
from tokens.documents import Documents
from tokens.records import encode_pair
from training import reference as reference_module
from training.reference import answer_logps, check_reference, reference_logps


@pytest.fixture
def pairs_alone(preferences, tmp_path):
    """A copy of the pairs, in a folder of its own."""
    (tmp_path / "data").mkdir()
    return Path(shutil.copy(preferences, tmp_path / "data"))


@pytest.fixture
def reference(base, pairs_alone, tmp_path):
    """`reference()`: computed or read as dpo.py does it, and the file it is kept in, if there."""
    model, device = loaded(base)
    config = dpo.DPOConfig(model=str(base), out=str(tmp_path), dtype="float32", micro_tokens=1000)

    def run():
        documents = Documents([pairs_alone], base, 200, encode_pair, tmp_path, per_record=2)
        found = reference_logps(model, documents, config, weights_key(base), device)
        return found, next(pairs_alone.parent.glob("*.reference-*"), None)

    return run


@pytest.fixture
def computed(monkeypatch):
    """How often a model computed log-probabilities since."""
    calls = []

    def counted(*args):
        calls.append(args)
        return answer_logps(*args)

    monkeypatch.setattr(reference_module, "answer_logps", counted)
    return calls


def test_a_prompt_that_stands_once_changes_nothing(base, preferences):
    """Log-probabilities and gradients are those of two whole documents a pair."""
    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    model = Llama(read_config(base)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    pairs = np.arange(len(documents))
    weights = torch.randn(len(pairs), 2, dtype=torch.float64, generator=generator)
    assert documents.shared[:, 1].min() > 0 and documents.tokens.sum() < documents.lengths.sum()
    results = []
    for _ in range(2):
        logps = answer_logps(model, documents, pairs, torch.device("cpu"))
        gradients = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
        results.append([logps.detach(), *gradients])
        documents.shared[:] = 0
    # In fp64, but for norms and losses, which are fp32: each right to 6e-8.
    for once, twice in zip(*results, strict=True):
        assert (once - twice).abs().max() <= 1e-6 * twice.abs().max()


def test_the_first_loss_is_ln_2_on_any_packing(base, preferences):
    """In fp32 to 1e-6: log-probabilities in rows of other pairs are the same but for rounding."""
    model, device = loaded(base)
    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    pairs = np.arange(len(documents))
    with torch.no_grad():
        alone = torch.cat([answer_logps(model, documents, pairs[i : i + 1], device) for i in pairs])
        for rows in (pairs, pairs[::-1].copy()), (pairs[:7], pairs[7:]), (pairs[::2], pairs[1::2]):
            for row in rows if isinstance(rows[0], np.ndarray) else [rows]:
                policy = answer_logps(model, documents, row, device)
                losses, *_ = dpo.dpo_loss(*policy.T, *alone[row].T, beta=0.1)
                assert abs(losses.double() - math.log(2)).max() < 1e-6


def test_pairs_with_two_prompts_are_two_documents(base, preferences, tmp_path):
    """Where the ids of the prompts differ (a cache that was made so): counted, said, and right."""
    records = [json.loads(line) for line in open(preferences, encoding="utf-8")][:5]
    path = write(tmp_path / "pairs.jsonl", records)
    whole = Documents([path], base, 200, encode_pair, per_record=2)
    cache = next(tmp_path.glob("pairs.jsonl.tokens-*")) / "tokens"
    tokens = np.fromfile(cache, np.int32)
    second = whole.lengths[0, 0] + 3  # a token of rejected's prompt in the first pair
    tokens[second] = tokens[second] % 50 + 3
    tokens.tofile(cache)
    documents = Documents([path], base, 200, encode_pair, per_record=2)
    assert documents.shared[0].tolist() == [0, 0] and documents.shared[1:, 1].min() > 0
    assert documents.tokens[0] == documents.lengths[0].sum()
    assert "1 pair with two prompts, computed twice each\n" in documents.summary()
    assert "two prompts" not in whole.summary()
    model, device = loaded(base)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        ours = answer_logps(model, documents, np.arange(5), device)
        torch.testing.assert_close(
            ours, their_logps(theirs, documents, range(5)), rtol=1e-5, atol=1e-3
        )


def test_a_reference_of_rows_with_every_prompt_twice_is_not_taken(base, preferences):
    """Its rounding is another: the name of the file that holds it is another, too."""
    model, _ = loaded(base)
    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    config = dpo.DPOConfig(dtype="float32")
    shape = dataclasses.asdict(model.config)
    facts = json.dumps(["weights", shape, documents.key, config.max_seq_len, config.dtype])
    older = hashlib.sha256(facts.encode()).hexdigest()[:16]
    for path in reference_files(model, documents, config, "weights"):
        assert not path.name.endswith(older)


def test_packed_answers_have_transformers_log_probabilities(base, preferences):
    """All pairs in one row give what transformers gives document by document."""
    model, device = loaded(base)
    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pairs = np.array([3, 0, 18, 7])
    with torch.no_grad():
        ours = answer_logps(model, documents, pairs, device)
        # Sums of up to some hundred fp32 terms of about 6.
        torch.testing.assert_close(
            ours, their_logps(theirs, documents, pairs), rtol=1e-5, atol=1e-3
        )
        assert answer_logps(model, documents, pairs[:0], device).shape == (0, 2)


# ---- The reference is kept


def test_a_second_run_computes_nothing_and_no_random_state_moves(reference, computed):
    """The file beside the data is enough; it is whole, and nothing else appears there."""
    state = torch.random.get_rng_state()
    first, kept = reference()
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (19, 2) and first.isfinite().all() and computed
    computed.clear()
    again, _ = reference()
    assert torch.equal(again, first) and not computed
    names = sorted(path.name for path in kept.parent.iterdir())
    assert len(names) == 3 and names[0] == "preferences.jsonl"  # the pairs, reference and tokens


def test_a_computation_that_was_cut_short_goes_on(reference, computed):
    """Pairs whose log-probabilities are not kept yet are computed, and the file completed."""
    first, kept = reference()
    half = first.clone()
    half[7:] = math.nan
    write_reference([kept], half)
    computed.clear()
    again, _ = reference()
    assert torch.equal(again, first) and computed
    assert torch.equal(read_reference([kept], None), first)


def test_thousands_of_pairs_are_computed_once_each(
    reference, preferences, pairs_alone, monkeypatch
):
    """Over the borders of what is written at a time: 1,024 pairs, 1,024 more, and the last two."""
    shortest = min(preferences.read_text().splitlines(True), key=len)
    pairs_alone.write_text(shortest * 2050)
    asked = []

    def numbers(model, documents, pairs, device):
        asked.extend(pairs)
        return torch.stack([torch.tensor(pairs), -torch.tensor(pairs)], 1).double()

    monkeypatch.setattr(reference_module, "answer_logps", numbers)
    found, kept = reference()
    expected = torch.arange(2050, dtype=torch.float64)
    assert torch.equal(found, torch.stack([expected, -expected], 1))
    assert sorted(asked) == list(range(2050))
    assert torch.equal(read_reference([kept], None), found)


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_byte,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-16]),  # of a pair less
        lambda path: np.save(path.open("wb"), np.zeros((19, 2))),
    ],
    ids=["half", "one bit", "empty", "a pair less", "another format"],
)
def test_a_damaged_file_is_made_anew(reference, damage, capsys):
    """Whatever stands there: a warning names it, and the right numbers come out."""
    first, kept = reference()
    damage(kept)
    assert torch.equal(reference()[0], first)
    assert f"warning: {kept} is damaged" in capsys.readouterr().err
    assert torch.equal(read_reference([kept], None), first)


def test_another_model_setting_or_data_is_another_file(base, pairs_alone, tmp_path):
    """Weights, whether they are quantised, config.json, precision, length and pairs decide; names
    of folders do not."""

    def name(folder=base, max_seq_len=200, dtype="float32", path=pairs_alone, quantize=None):
        with torch.device("meta"):
            model = Llama(read_config(folder))
        documents = Documents([path], folder, max_seq_len, encode_pair, per_record=2)
        flags = {"max_seq_len": max_seq_len, "dtype": dtype, "quantize": quantize}
        config = dpo.DPOConfig(model=str(folder), out=str(tmp_path), **flags)
        return reference_files(model, documents, config, weights_key(folder))[0].name

    start()
    copy, weights, config = (shutil.copytree(base, tmp_path / x) for x in ("copy", "w", "c"))
    flip_byte(weights / "model.safetensors")
    fields = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(fields | {"rope_theta": 5000.0}))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / pairs_alone.name
    other.write_text("".join(pairs_alone.read_text().splitlines(True)[:-1]))
    names = [name(), name(weights), name(config), name(max_seq_len=100), name(dtype="bfloat16")]
    names += [name(path=other), name(quantize="nf4")]
    assert len(set(names)) == len(names)
    assert name(copy) == name()


def test_runs_that_write_at_once(tmp_path):
    """Two runs on the same data: whoever reads finds one of their files, whole."""
    path, first = tmp_path / "reference", torch.zeros(5000, 2, dtype=torch.float64)
    write_reference([path], first)

    def write(number):
        for _ in range(20):
            write_reference([path], first + number)

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, number) for number in (1, 2)]
        while not all(writer.done() for writer in writers):
            found = read_reference([path], None)
            assert found is not None and (found == found[0, 0]).all()
    for writer in writers:
        writer.result()
    assert list(tmp_path.iterdir()) == [path]


def refuse(monkeypatch, folder, number):
    """From now on no file can be written in `folder`."""

    def refusing_open(path, mode="r", **options):
        if Path(path).parent == folder and mode != "r":
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, **options)

    monkeypatch.setattr(files, "open", refusing_open, raising=False)


def test_a_folder_that_cannot_be_written(reference, pairs_alone, tmp_path, monkeypatch, computed):
    """Then the reference is kept in the output folder, and found there."""
    refuse(monkeypatch, pairs_alone.parent, errno.EROFS)
    first, kept = reference()
    assert kept is None
    assert [p.name for p in tmp_path.iterdir() if p.is_file()][0].startswith(pairs_alone.name)
    computed.clear()
    assert torch.equal(reference()[0], first) and not computed


def test_no_disk_takes_it(tmp_path, monkeypatch):
    """An error says so, and nothing half made stays."""
    refuse(monkeypatch, tmp_path, errno.ENOSPC)
    with pytest.raises(RunError, match="could not be kept .*No space left on device"):
        write_reference([tmp_path / "a", tmp_path / "b"], torch.zeros(1, 2))
    assert not list(tmp_path.iterdir())


def test_log_probabilities_that_are_not_finite(base, reference, monkeypatch):
    """They stop the run at once, not when the pair's turn comes, with the pair's name."""

    def broken(model, documents, pairs, device):
        return torch.where(torch.tensor(pairs == 4)[:, None], math.nan, torch.zeros(len(pairs), 2))

    monkeypatch.setattr(reference_module, "answer_logps", broken)
    with pytest.raises(RunError, match=r"1 of the first 19 pairs .* not finite.*:5 \(id p4\)"):
        reference()
    with contextlib.suppress(RunError):
        reference()
    monkeypatch.undo()
    assert reference()[0].isfinite().all()


def test_a_pair_that_is_not_finite_is_named_by_its_place_in_the_data(base, preferences):
    """Not by its place among the thousand that were computed together."""
    documents = Documents([preferences], base, 500, encode_pair, per_record=2)
    logps = torch.zeros(4, 2)
    logps[2, 1] = math.inf
    with pytest.raises(RunError, match=r"1 of the first 12 pairs .* not finite.*:11 \(id p10\)"):
        check_reference(logps, documents, np.arange(8, 12))
