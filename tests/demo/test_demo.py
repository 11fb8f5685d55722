"""The demo's files are right and reproducible, nothing held out is trained on, and `answer` decodes
as transformers does; and training on them works, from the command to the printed answers."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from decoding.generator import Completion
from demo import tasks as demo
from demo.compare import compare, newest_model, report
from dpo import DPOConfig
from kernels import nf4
from sft import SFTConfig
from tokens.records import encode_conversation
from tokens.tokenizer import Tokenizer

QLORA = ("--lora-rank", "16", "--quantize", "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.make(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / "base")


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


def list_asked_about(messages):
    """The words or digits of a conversation's list, found in the text of its first question."""
    known = {word for words in demo.WORDS.values() for word in words}
    question = next(m["content"] for m in messages if m["role"] == "user")
    return [word for word in re.findall(r"\w+", question) if word in known or word.isdigit()]


def solve(messages):
    """The right answer to the last question, from its text alone."""
    items, question = list_asked_about(messages), messages[-1]["content"]
    if re.search("sort|order", question, re.I):
        answer = " ".join(sorted(items))
    elif "largest" in question or "smallest" in question:
        answer = sorted(items)[-1 if "largest" in question else 0]
    else:
        (category,) = (name for name in demo.WORDS if name in question)
        (answer,) = (item for item in items if item in demo.WORDS[category])
    return answer.upper() if messages[0]["role"] == "system" else answer


def test_same_bytes_every_time(folder, tmp_path):
    """A second call writes the same files, byte for byte."""
    demo.make(tmp_path)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(names) == 9
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_held_out_lists_are_in_no_training_file(folder):
    """What a held-out prompt asks about occurs in no conversation and no pair."""
    held_out = {tuple(list_asked_about(row["messages"])) for row in read(folder, "held_out")}
    assert min(map(len, held_out)) >= 3
    shown = [row["messages"] for row in read(folder, "conversations")]
    shown += [row["chosen"] for row in read(folder, "preferences")]
    assert not held_out & {tuple(list_asked_about(messages)) for messages in shown}


def test_held_out_data_are_the_prompts_with_their_answers(folder):
    """On which the loss is measured: conversations for SFT, pairs for DPO."""
    rows = read(folder, "held_out")
    for row, chat in zip(rows, read(folder, "held_out_conversations"), strict=True):
        assert chat["messages"][:-1] == row["messages"]
        assert demo.solves(row["answer"], chat["messages"][-1]["content"])
    for row, pair in zip(rows, read(folder, "held_out_preferences"), strict=True):
        assert pair["chosen"][:-1] == pair["rejected"][:-1] == row["messages"]
        assert pair["chosen"][-1]["content"] == demo.sentence(row["answer"])
        assert pair["rejected"][-1]["content"] == row["answer"]


def test_every_answer_shown_is_right(folder):
    """Every assistant turn of every file solves the question before it, in one of the forms."""
    messages = [row["messages"] for row in read(folder, "conversations")]
    messages += [
        row[side] for row in read(folder, "preferences") for side in ("chosen", "rejected")
    ]
    for conversation in messages:
        turns = [k for k, m in enumerate(conversation) if m["role"] == "assistant"]
        assert turns and turns[-1] == len(conversation) - 1
        for k in turns:
            assert demo.solves(solve(conversation[:k]), conversation[k]["content"]), conversation


def test_held_out_answers_and_the_checker(folder):
    """The checker takes the right answer in both forms, and nothing else."""
    rows = read(folder, "held_out")
    for row in rows:
        right = solve(row["messages"])
        assert row["answer"] == right
        assert demo.solves(right, right) and demo.solves(right, demo.sentence(right))
        wrong = next(other["answer"] for other in rows if other["answer"] != right)
        for reply in (wrong, demo.sentence(wrong), right + ".", right.swapcase() + "x", ""):
            assert not demo.solves(right, reply)


def test_held_out_kinds(folder):
    """Equally many of each kind; with a system message and with several turns among them."""
    rows = read(folder, "held_out")
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(demo.KINDS, demo.HELD_OUT)
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles[-1] == "user"
        assert (roles.count("user") > 1) == (row["kind"] == "later turn")
        assert roles[0] == "system" or row["kind"] != "system message"


def test_conversations_are_of_the_tulu_schema_and_fit(folder, tokenizer):
    """Every conversation encodes, trains something and is not cut in the demo."""
    rows = read(folder, "conversations")
    assert len(rows) == demo.CONVERSATIONS
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows[:500]:
        ((ids, trained),) = encode_conversation(row, tokenizer)
        assert any(trained)
        assert len(ids) <= demo.SFT["max_seq_len"] <= demo.CONFIG["max_position_embeddings"]


def test_pairs(folder):
    """Chosen and rejected agree on the prompt, both are right, and only the first is a sentence."""
    rows = read(folder, "preferences")
    assert len(rows) == demo.PAIRS
    for row in rows:
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["chosen"][-2] == {"role": "user", "content": row["prompt"]}
        bare = solve(row["chosen"][:-1])
        assert row["rejected"][-1] == {"role": "assistant", "content": bare}
        assert row["chosen"][-1] == {"role": "assistant", "content": demo.sentence(bare)}


def test_conversations_leave_the_form_open(folder):
    """Half of the answers are sentences: four of five after a question, one of five otherwise.

    Counted over more than 7,000 answers each: the standard deviation is below 0.005.
    """
    sentences = {True: [], False: []}
    for row in read(folder, "conversations"):
        for question, reply in zip(row["messages"], row["messages"][1:], strict=False):
            if reply["role"] == "assistant":
                asked = question["content"].endswith("?")
                sentences[asked].append(reply["content"].startswith("The answer is"))
    for asked, expected in ((True, 0.8), (False, 0.2)):
        assert len(sentences[asked]) > 7_000
        assert sum(sentences[asked]) / len(sentences[asked]) == pytest.approx(expected, abs=0.02)


def test_tokenizer(tokenizer):
    """Any text survives, through bytes where it must; a line feed is always a piece of its own."""
    sp = tokenizer.sp
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id()) == (0, 1, 2)
    assert sp.vocab_size() == demo.CONFIG["vocab_size"]
    assert not any("\n" in sp.id_to_piece(i) for i in range(sp.vocab_size()))
    for text in ("Sort fox jam.", "  two  spaces ", "naïve 日本 🦊👩‍🚀", "a\n\nb\t", "¿12345?"):
        assert sp.decode(sp.encode(text)) == text
    assert sp.encode("123", out_type=str) == ["▁", "1", "2", "3"]


def test_settings_are_flags_of_the_scripts():
    """Every demo setting is a flag of its script."""
    SFTConfig(**demo.SFT)
    DPOConfig(**demo.DPO)


def test_the_newest_model_is_that_of_dpo(tmp_path):
    """Where DPO has not finished, that of SFT; a folder without config.json is no model yet."""
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
    for name in ("sft", "dpo"):
        (tmp_path / name / "config.json").write_text("{}")
        assert newest_model(tmp_path) == tmp_path / name


def test_compare_counts_right_answers(folder):
    """The printed rates are those of the replies."""
    rows = read(folder, "held_out")
    right = [row["answer"] for row in rows]
    half = [demo.sentence(a) if k % 2 else "\ufffd\x00" for k, a in enumerate(right)]
    text = report(rows, half, right)
    rates = {line[:15].strip(): re.findall(r"[\d.]+%", line) for line in text.splitlines()}
    assert rates["all"] == ["50.0%", "100.0%"]
    assert rates["sort numbers"] == ["50.0%", "100.0%"]
    assert rates["in sentences"] == ["50.0%", "0.0%"]
    assert all(line.isprintable() for line in text.splitlines())


def test_compare_shows_the_answers_of_both_models_in_order(folder, monkeypatch, capsys):
    """Every held-out prompt is answered by the model before training, then by the one after it."""

    class Named:  # a model that answers with its name
        tokenizer = SimpleNamespace(prompt=lambda messages: messages)

        def __init__(self, place, *_, **__):
            self.place = place

        def generate(self, prompts, sampling):
            return [Completion(text=self.place) for _ in prompts]

    monkeypatch.setattr("demo.compare.TextGenerator", SimpleNamespace(from_folder=Named))
    compare("untrained", "trained", folder)
    rows = read(folder, "held_out")
    expected = report(rows, ["untrained"] * len(rows), ["trained"] * len(rows))
    assert capsys.readouterr().out == expected + "\n"


def rates(stdout):
    """`{first words of a line: its last two percentages}` of the printed table."""
    found = re.findall(r"^(\w[\w ]*?)  +.*?([\d.]+)% +([\d.]+)%$", stdout, re.M)
    return {name: (float(before), float(after)) for name, before, after in found}


def torchrun(folder, script, *flags, ranks=1):
    """What a command that runs in `folder` prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command = [*launcher, ROOT / script, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_demo_on_two_ranks_ends_as_on_one(tmp_path):
    """One of them compares the models, while the other is gone."""
    assert "all" in rates(torchrun(tmp_path, "sft.py", "--max-steps", "1", ranks=2))


def test_the_demo_end_to_end(tmp_path):
    """torchrun sft.py learns the tasks; torchrun dpo.py turns to sentences and keeps the tasks.

    By QLoRA, too, of which 40 of 100 updates must do here: 91 % in sentences were seen.
    """
    sft, dpo = (rates(torchrun(tmp_path, script)) for script in ("sft.py", "dpo.py"))
    assert set(demo.KINDS) | {"all", "in sentences"} <= set(sft)
    assert sft["all"][0] < 5 and sft["all"][1] >= 90
    assert dpo["all"][0] == sft["all"][1] and dpo["all"][1] >= 90
    assert dpo["in sentences"][0] < 60 and dpo["in sentences"][1] > 90
    for out in ("sft", "dpo"):
        folder = tmp_path / "runs" / "demo" / out
        assert (folder / "model.safetensors").is_file()
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [r["loss"] for r in records if r.get("event") == "eval"]
        assert len(losses) >= 4 and losses[-1] < losses[0]  # what is not trained gets better, too
    qlora = rates(torchrun(tmp_path, "dpo.py", *QLORA, "--max-steps", "40"))
    assert qlora["all"][0] == sft["all"][1] and qlora["all"][1] >= 90
    assert qlora["in sentences"][1] > qlora["in sentences"][0] + 20


def test_the_demo_by_qlora_changes_nothing_but_by_its_adapters(tmp_path):
    """Twenty updates: the loss falls, and what is saved is the base, decoded, plus the product."""
    torchrun(tmp_path, "sft.py", *QLORA, "--max-steps", "20")
    base, out = (tmp_path / "runs" / "demo" / name for name in ("base", "sft"))
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [r["loss"] for r in records if "grad_norm" in r]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    before, after = (load_file(place / "model.safetensors") for place in (base, out))
    halves = load_file(out / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and len(halves) == 2 * 7 * 3
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            stem = "base_model.model." + name.removesuffix(".weight")
            A, B = (halves[f"{stem}.lora_{half}.weight"] for half in "AB")
            assert B.any()
            weight = nf4.dequantize(nf4.quantize(weight), torch.float32) + (16 / 16) * B @ A
        # Half a unit of bf16's eight bits, and fp32's rounding where terms cancel.
        torch.testing.assert_close(after[name].float(), weight, rtol=2**-8, atol=1e-6)
