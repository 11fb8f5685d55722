"""Answers of a Llama in a Hugging Face folder: a chat in the terminal, or a file of prompts.

    python generate.py                                     a chat with the demo's model
    python generate.py --model DIR                         a chat with yours
    python generate.py --model DIR --prompt "What is 2+2?"
    torchrun --nproc_per_node 8 generate.py --model DIR --prompts FILE.jsonl --out FILE.jsonl

A line of --prompts is {"prompt": TEXT} or {"messages": [{"role": …, "content": …}, …]}. --out gets
the same lines in the same order, each with a "completion". Until all are answered, the answers so
far are in a file beside --out; after an interruption the same command continues from that file.
Under torchrun each GPU holds the whole model and answers a share of the lines.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.config import read_config
from checkpoint.weights import weight_files
from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from demo.command import train_sft
from demo.compare import newest_model
from program.errors import InputError, amount, reported
from program.files import hold, whole_lines
from program.flags import check_bounds, parse_args
from program.progress import progress_bar
from program.ranks import gather_lists, leave, start
from tokens import readers
from tokens.shapes import plain_messages, text_of
from tokens.tokenizer import Tokenizer

HELP = """/system TEXT   how the assistant should behave from now on (without TEXT: nothing set)
/reset         forget the conversation
/quit          leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class GenerateConfig:
    """The flags of generate.py."""

    model: str | None = None  # Hugging Face folder (default: the demo's newest model)
    prompt: str | None = None  # one question: print its answer and exit
    prompts: str | None = None  # a .jsonl of prompts or messages: write the answers to --out
    out: str | None = None  # a new .jsonl: the lines of --prompts with their completions
    system: str | None = None  # a system message before every --prompt, "prompt" or chat
    chat: bool = True  # Tulu's chat format; --no-chat: continue the bare text
    max_new_tokens: int = 1024  # an answer is cut off after so many tokens
    temperature: float = 0.0  # 0: always the likeliest token; 1: the model's own probabilities
    top_p: float = 1.0  # sample from the smallest set of tokens with this total probability
    stop: list[str] | None = None  # an answer ends before the first of these strings
    seed: int = 42  # of the samples
    slots: int | None = None  # sequences at a time (default: 16; on a GPU what its memory holds)
    context: int = 0  # maximum tokens of prompt and answer together (0: the model's limit)
    dtype: str | None = None  # bfloat16 or float32 (default: bfloat16 on a GPU)
    compile: bool = True  # on a GPU: compile a block and record a step, which takes seconds


def main(flags: dict) -> None:
    _, world, device = start()
    config = GenerateConfig(**flags)
    check_flags(config, world)
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    records = read_prompts(config) if config.prompts else None
    model = config.model or demo_model()
    prompts = encode_prompts(records, model, config) if records else None  # token ids
    slots = config.slots if config.prompts else 1
    generator = TextGenerator.from_folder(
        model, device, getattr(torch, dtype), config.context or None, slots, config.compile
    )
    stop = tuple(config.stop or ())
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, stop, config.seed)
    if records:
        answer_file(generator, records, prompts, Path(config.out), sampling)
    elif config.prompt is not None:
        ids = prompt_ids(generator.tokenizer, {"prompt": config.prompt}, config)
        print_answer(generator.stream(ids, sampling))
    else:
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 does not end a chat
        chat(generator, config, sampling)


def check_flags(config: GenerateConfig, world: int) -> None:
    """Raise `InputError` for a bad value of a flag, or for flags that exclude each other."""
    check_bounds(config)
    if (config.prompts is None) != (config.out is None):
        raise InputError("--prompts FILE and --out FILE go together")
    if config.prompts is not None and config.prompt is not None:
        raise InputError("found --prompt and --prompts, expected one of them")
    if not config.chat and config.system is not None:
        raise InputError("found --no-chat with --system, expected --system only in chat format")
    if not config.chat and config.prompt is None and config.prompts is None:
        raise InputError("--no-chat continues --prompt or --prompts, found neither of them")
    if config.prompts is None and world > 1:
        raise InputError(f"found {world} processes, expected one for a chat or --prompt")
    if "" in (config.stop or ()):
        raise InputError("--stop is empty, expected some text")
    for text in (config.prompt, config.system, *(config.stop or ())):
        if text is not None and text.encode(errors="replace").decode() != text:
            raise InputError(f"found {text!a} among the flags, expected UTF-8")
    if config.out is not None:
        if Path(config.out).exists():
            raise InputError(f"--out {config.out}: exists, expected a new file")
        if not Path(config.out).absolute().parent.is_dir():
            raise InputError(f"--out {config.out}: no such folder, expected one that exists")


def demo_model() -> str | Path:
    """The folder of the demo's newest model. Where there is none, it is trained first."""
    try:
        return newest_model()
    except InputError:
        train_sft()
        return newest_model()


# ---- Files of prompts


def read_prompts(config: GenerateConfig) -> list[dict]:
    """The records of --prompts. Raises `InputError` with file and line for a bad one."""
    path, records = Path(config.prompts), []
    if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--prompts {path}: expected a .jsonl file")
    for number, record in readers.records(path):
        try:
            check_prompt(record, config.chat)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        records.append(record)
    if not records:
        raise InputError(f"{path}: found no prompt, expected one or more")
    return records


def check_prompt(record: dict, chat: bool) -> None:
    """Raise `ValueError` unless a record has a "prompt" or, in chat format, "messages"."""
    if ("prompt" in record) == ("messages" in record):
        raise ValueError('expected either "prompt" or "messages"')
    if "prompt" in record:
        text_of(record["prompt"], "prompt")
    elif not chat:
        raise ValueError('found "messages", expected "prompt" with --no-chat')
    else:
        plain_messages(record["messages"], "messages")
        if record["messages"][-1]["role"] == "assistant":
            raise ValueError("found an assistant's message at the end, expected a user's message")


def prompt_ids(tokenizer: Tokenizer, record: dict, config: GenerateConfig) -> list[int]:
    """Token ids of a record's prompt."""
    if "messages" in record:
        return tokenizer.prompt(plain_messages(record["messages"], "messages"))
    text = text_of(record["prompt"], "prompt")
    if not config.chat:
        return tokenizer.raw(text)
    system = [{"role": "system", "content": config.system}] if config.system else []
    return tokenizer.prompt([*system, {"role": "user", "content": text}])


def encode_prompts(records: list[dict], model: str | Path,
                   config: GenerateConfig) -> list[list[int]]:  # fmt: skip
    """Token ids of each record's prompt. Raises `InputError` for one that fills the context."""
    context = config.context or read_config(model).max_position_embeddings
    tokenizer = Tokenizer(model)
    prompts = [prompt_ids(tokenizer, record, config) for record in records]
    for record, ids in zip(records, prompts, strict=True):
        if len(ids) >= context:
            beginning = json.dumps(record, ensure_ascii=False)[:60]
            raise InputError(
                f"--prompts {config.prompts}: {beginning}… has {len(ids)} tokens, expected fewer "
                f"than the {context} of the model's context"
            )
    return prompts


def answer_file(generator: TextGenerator, records: list[dict], prompts: list[list[int]], out: Path,
                sampling: Sampling) -> None:  # fmt: skip
    """Answer every record and write `out`, which appears when all answers are there.

    Until then the answers are in a file whose name holds a hash of everything that decides them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        key = answers_key(generator, records, prompts, sampling)
        partial = out.with_name(f"{out.name}.partial-{key}")
        file = open(partial, "a", encoding="utf-8")
        hold(file, out)
        if out.exists():  # another run held it, and has finished
            raise InputError(f"--out {out}: exists, expected a new file")
        lines = whole_lines(partial)
        os.truncate(partial, sum(map(len, lines)))
    (done,) = gather_lists([len(lines)] if rank == 0 else [])
    bar = progress_bar(total=len(records), initial=done, unit="prompt", disable=rank > 0)
    cut_off = 0
    chunk = 4 * generator.most * world  # prompts between two writes
    for begin in range(done, len(records), chunk):
        numbers = range(begin, min(begin + chunk, len(records)))
        mine = numbers[rank::world]
        answers = generator.generate(
            [prompts[i] for i in mine], sampling, mine, lambda: bar.update(world)
        )
        texts = dict(gather_lists([(i, a.text) for i, a in zip(mine, answers, strict=True)]))
        cut_off += sum(gather_lists([a.finish in ("length", "context") for a in answers]))
        if rank == 0:
            for i in numbers:
                line = records[i] | {"completion": texts[i]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    bar.close()
    if rank == 0:
        os.replace(partial, out)
        now = f"{len(records) - done:,} made now, {cut_off:,} of them cut off for their length"
        print(f"{out}: {amount(len(records), 'answers')}, {now}")


def answers_key(generator: TextGenerator, records: list[dict], prompts: list[list[int]],
                sampling: Sampling) -> str:  # fmt: skip
    """A hash of what decides the answers.

    Weights enter by name, size and time of change: hashing the content of a 70B takes minutes.
    """
    folder = generator.tokenizer.path.parent.resolve()
    stats = [(str(path), path.stat()) for path in weight_files(folder)]
    weights = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    settings = str(generator.dtype), generator.context, dataclasses.asdict(sampling)
    facts = json.dumps([weights, settings, records, prompts])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


# ---- The terminal


def chat(generator: TextGenerator, config: GenerateConfig, sampling: Sampling) -> None:
    """Read questions and print answers until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() arrow keys and a history
    system, turns = config.system, []
    print(HELP)
    while True:
        try:
            line = input("\n> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            turns = []
        elif command == "/system":
            system = rest.strip() or None
        elif command.startswith("/"):
            print(HELP)
        elif line:
            messages = [{"role": "system", "content": system}] if system else []
            messages += [*turns, {"role": "user", "content": line}]
            try:
                ids = generator.tokenizer.prompt(messages)
                answer = print_answer(generator.stream(ids, sampling))
            except InputError as error:
                print(f"{error}: /reset forgets the conversation")
                continue
            turns += [messages[-1], {"role": "assistant", "content": answer}]


def print_answer(pieces: Iterable[tuple[str, str | None]]) -> str:
    """Print an answer piece by piece and return its text. Ctrl-C ends the answer early."""
    text, finish = "", None
    try:
        for piece, finish in pieces:  # noqa: B007, the last finish is used after the loop
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        finish = "stopped"
    print()
    reasons = {"length": "--max-new-tokens", "context": "the context is full", "stopped": "Ctrl-C"}
    if finish in reasons:
        print(f"[cut off: {reasons[finish]}]", file=sys.stderr)
    return text


if __name__ == "__main__":
    with reported():
        main(parse_args(GenerateConfig))
        leave()
