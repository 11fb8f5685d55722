"""generate.py: files of prompts and the chat, run as a user runs them, on the tiny model."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import generate
from decoding.generator import TextGenerator
from program.errors import InputError
from program.flags import parse_args
from tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
LINES = [
    {"prompt": "What is 2 plus 2?", "id": 7},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"prompt": "The dog\nsleeps. " * 9},
    {"prompt": "Größe über café"},
    {"prompt": "for i in range(10):"},
]


@pytest.fixture
def prompts(tmp_path):
    """Path of a file of prompts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def flags_for(base, prompts, **more):
    """Flags of a run on the tiny model, two sequences at a time."""
    out = prompts.with_name("out.jsonl")
    flags = {"model": str(base), "prompts": str(prompts), "out": str(out), "slots": 2}
    return flags | {"max_new_tokens": 9} | more


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def their_answer(base, messages, max_new_tokens):
    """transformers' greedy answer to a conversation, or continuation of a text, as text."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = Tokenizer(base)
    text = isinstance(messages, str)
    ids = [1, *tokenizer.sp.encode(messages)] if text else tokenizer.prompt(messages)
    ids = torch.tensor([ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                         do_sample=False, eos_token_id=2, pad_token_id=0)  # fmt: skip
    answer = out[0, ids.shape[1] :].tolist()
    return tokenizer.continuation(answer[: answer.index(2)] if 2 in answer else answer)


def test_every_line_is_answered_in_order(base, prompts):
    """The same lines with transformers' greedy answers; no other file stays in the folder."""
    generate.main(flags_for(base, prompts))
    answered = read(prompts.with_name("out.jsonl"))
    for line, record in zip(LINES, answered, strict=True):
        messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        assert record == line | {"completion": their_answer(base, messages, 9)}
    assert {path.name for path in prompts.parent.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_an_interrupted_file_is_continued(base, prompts, monkeypatch):
    """After a failure in the second chunk and half a line, only the missing answers are made."""
    flags = flags_for(base, prompts, slots=1, temperature=1.0)
    generate.main(flags | {"out": str(prompts.with_name("whole.jsonl"))})
    made, real = [], TextGenerator.generate

    def fail(self, prompts, *more):
        if made:
            raise KeyboardInterrupt
        made.append(len(prompts))
        return real(self, prompts, *more)

    def count(self, prompts, *more):
        made.append(len(prompts))
        return real(self, prompts, *more)

    monkeypatch.setattr(TextGenerator, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        generate.main(flags)
    (begun,) = prompts.parent.glob("out.jsonl.partial-*")
    with open(begun, "a") as file:
        file.write('{"prompt": "half a')
    monkeypatch.setattr(TextGenerator, "generate", count)
    generate.main(flags)
    assert made == [4, 1]
    assert read(prompts.with_name("out.jsonl")) == read(prompts.with_name("whole.jsonl"))


def test_one_run_at_a_time(base, prompts, monkeypatch):
    """A second run with the same --out is refused; what the first wrote stays."""
    flags = flags_for(base, prompts)
    monkeypatch.setattr(generate, "hold", partial(generate.hold, patience=0))

    def meanwhile(self, prompts, *more):
        with pytest.raises(InputError, match="out.jsonl: another run is writing there"):
            generate.main(flags)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "generate", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        generate.main(flags)


def test_the_run_waited_for_has_ended(base, prompts, monkeypatch):
    """A run that waited for another one finds its answers and does not write them again."""
    flags = flags_for(base, prompts)
    monkeypatch.setattr(generate, "hold", lambda file, out: out.write_text("whole"))
    with pytest.raises(InputError, match="out.jsonl: exists"):
        generate.main(flags)
    assert prompts.with_name("out.jsonl").read_text() == "whole"


def test_other_settings_start_again(base, prompts, monkeypatch):
    """Answers to other lines, or of another precision, context or seed, are not continued."""

    def stop(self, *more):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "generate", stop)
    flags = flags_for(base, prompts)
    other = prompts.with_name("other.jsonl")
    other.write_text(prompts.read_text().replace('"id": 7', '"id": 8'))
    for changes in ({}, {"slots": 3}, {"dtype": "bfloat16"}, {"context": 999}, {"seed": 1},
                    {"prompts": str(other)}):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            generate.main(flags | changes)
    assert len(list(prompts.parent.glob("out.jsonl.partial-*"))) == 5  # --slots changes no answer


def test_two_ranks_answer_as_one(base, prompts):
    """Two ranks write the same file as one process, samples included."""
    flags = flags_for(base, prompts, temperature=1.0, top_p=0.9)
    generate.main(flags | {"out": str(prompts.with_name("one.jsonl"))})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command.append("generate.py")
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read(prompts.with_name("out.jsonl")) == read(prompts.with_name("one.jsonl"))


def test_a_prompt_that_fills_the_context_is_refused(base):
    """As no token could follow it; one token less leaves room for one."""
    records = [{"prompt": "one two"}]
    (ids,) = generate.encode_prompts(records, base, generate.GenerateConfig())
    config = generate.GenerateConfig(prompts="p.jsonl", context=len(ids))
    with pytest.raises(InputError, match=f"p.jsonl: .*has {len(ids)} tokens, expected fewer than"):
        generate.encode_prompts(records, base, config)
    config = generate.GenerateConfig(prompts="p.jsonl", context=len(ids) + 1)
    assert generate.encode_prompts(records, base, config) == [ids]


def test_a_system_message_stands_before_prompts_and_not_before_messages(base):
    """--system belongs to a "prompt"; "messages" have their own, or none."""
    user = {"role": "user", "content": "Hi"}
    config, tokenizer = generate.GenerateConfig(system="Be brief."), Tokenizer(base)
    asked = generate.encode_prompts([{"prompt": "Hi"}, {"messages": [user]}], base, config)
    system = {"role": "system", "content": "Be brief."}
    assert asked == [tokenizer.prompt([system, user]), tokenizer.prompt([user])]


def test_without_a_demo_model_it_is_trained(tmp_path, monkeypatch):
    """`python generate.py` alone: SFT of the demo runs once, and its model is used."""
    monkeypatch.chdir(tmp_path)
    trained = []

    def train_sft():
        trained.append(Path("runs/demo/sft"))
        trained[0].mkdir(parents=True)
        (trained[0] / "config.json").touch()

    monkeypatch.setattr(generate, "train_sft", train_sft)
    assert [generate.demo_model(), generate.demo_model()] == 2 * [Path("runs/demo/sft")]
    assert len(trained) == 1


def test_one_prompt_with_and_without_chat_format(base, capsys):
    """--prompt prints the answer; --no-chat continues the bare text."""
    flags = {"model": str(base), "max_new_tokens": 5}
    generate.main(flags | {"prompt": "Hi"})
    expected = their_answer(base, [{"role": "user", "content": "Hi"}], 5)
    assert capsys.readouterr().out == expected + "\n"
    generate.main(flags | {"prompt": "def add(", "chat": False})
    assert capsys.readouterr().out == their_answer(base, "def add(", 5) + "\n"


def test_chat(base, monkeypatch, capsys):
    """Which turns precede each question: after commands, Ctrl-C in an answer and at the prompt."""
    asked = []

    class Scripted:
        context = 64
        tokenizer = type("Messages", (), {"prompt": staticmethod(lambda messages: messages)})

        def stream(self, messages, sampling):
            asked.append([(m["role"][0], m["content"]) for m in messages])
            if messages[-1]["content"] == "too long":
                raise InputError("a prompt has 99 tokens")
            yield "par", None
            if messages[-1]["content"] == "interrupt":
                raise KeyboardInterrupt
            yield "tial", "eos"

    lines = iter(
        ["one", "", "/system Be brief.", "two", KeyboardInterrupt, "interrupt", "three", "too long",
         "/reset", "four", "/system", "/nonsense", "five", "/quit", "never"]
    )  # fmt: skip

    def typed(_):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    generate.chat(Scripted(), generate.GenerateConfig(), None)
    one, two = [("u", "one"), ("a", "partial")], [("u", "two"), ("a", "partial")]
    brief, cut = ("s", "Be brief."), [("u", "interrupt"), ("a", "par")]
    three = [("u", "three"), ("a", "partial")]
    assert asked == [
        [("u", "one")],
        [brief, *one, ("u", "two")],
        [brief, *one, *two, ("u", "interrupt")],
        [brief, *one, *two, *cut, ("u", "three")],
        [brief, *one, *two, *cut, *three, ("u", "too long")],
        [brief, ("u", "four")],
        [("u", "four"), ("a", "partial"), ("u", "five")],
    ]
    shown = capsys.readouterr()
    assert "cut off: Ctrl-C" in shown.err and "99 tokens: /reset" in shown.out
    assert shown.out.count(generate.HELP) == 2 and next(lines) == "never"


def test_invalid_utf8_does_not_end_a_chat(base):
    """Input from a terminal whose encoding is not UTF-8 is answered, and the chat goes on."""
    command = [sys.executable, "generate.py", "--model", str(base), "--max-new-tokens", "3"]
    done = subprocess.run(command, cwd=ROOT, input=b"caf\xe9\n", capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(b"\n> ") == 2


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"prompt": 3}', "prompt is 3, expected a string"),
        ('{"text": "a"}', 'expected either "prompt" or "messages"'),
        ('{"messages": []}', "expected a list of messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "found an assistant's message"),
        ('{"prompt": "a"', "not JSON"),
        ("[1]", "expected an object"),
        ('{"prompt": "' + "many words " * 2000 + '"}', "the model's context"),
    ],
)
def test_a_bad_line_is_named(base, prompts, line, expected, monkeypatch):
    """A bad line is refused with file and line before the model is loaded; nothing is written."""
    monkeypatch.delattr(TextGenerator, "from_folder")
    with open(prompts, "a") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(InputError, match=expected) as caught:
        generate.main(flags_for(base, prompts))
    if "context" not in expected:
        assert f"{prompts}:{len(LINES) + 2}: " in str(caught.value)
    assert [path.name for path in prompts.parent.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--prompts x.jsonl", "go together"),
        ("--prompts x.jsonl --out y.jsonl", "expected a .jsonl file"),
        ("--prompts x.jsonl --out y.jsonl --prompt hi", "expected one of them"),
        ("--no-chat", "found neither of them"),
        ("--prompt caf\udce9", "'caf.udce9' among the flags, expected UTF-8"),
        ("--prompt a --system \udce9", "expected UTF-8"),
        ("--no-chat --prompt a --system b", "found --no-chat with --system"),
        ("--prompt a --temperature -1", "--temperature is -1.0"),
        ("--prompt a --top-p 0", "--top-p is 0.0"),
        ("--prompt a --stop x --dtype int8", "--dtype is int8"),
        ("--prompt a --model nowhere", "nowhere: no such folder"),
        ("--prompts x.jsonl --out nowhere/y.jsonl", "no such folder"),
    ],
)
def test_bad_flags(arguments, expected, tmp_path, monkeypatch):
    """The error names the flag."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=expected):
        generate.main(parse_args(generate.GenerateConfig, arguments.split()))
