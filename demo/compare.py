"""What the demo's training taught: held-out prompts answered before and after, and the rates."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from demo.tasks import FOLDER, KINDS, LONGEST_ANSWER, prefers, solves
from program.errors import InputError


def newest_model(folder: Path = FOLDER) -> Path:
    """The demo's model after DPO, or else after SFT; raises `InputError` where neither is there."""
    for place in (Path(folder) / "dpo", Path(folder) / "sft"):
        if (place / "config.json").is_file():
            return place
    raise InputError(
        f"{folder}: no demo model, expected one made by `torchrun sft.py` (or --model DIR)"
    )


def compare(before: Path, after: Path, folder: Path = FOLDER) -> None:
    """Have two models answer the held-out prompts of `make(folder)`; print what changed."""
    rows = [json.loads(line) for line in open(Path(folder) / "held_out.jsonl", encoding="utf-8")]
    replies = []
    for place in (before, after):
        generator = TextGenerator.from_folder(place, torch.device("cpu"), torch.float32, slots=64)
        prompts = [generator.tokenizer.prompt(row["messages"]) for row in rows]
        answers = generator.generate(prompts, Sampling(LONGEST_ANSWER))
        replies.append([answer.text for answer in answers])
    print(report(rows, *replies))


def report(rows: list[dict], before: list[str], after: list[str]) -> str:
    """A prompt of each kind with its answers before and after, then the rates."""
    lines = [("held-out prompt", "", "before", "after")]
    for kind in KINDS:
        i = next(i for i, row in enumerate(rows) if row["kind"] == kind)
        *context, question = rows[i]["messages"]
        for message in context:
            lines.append((kind, f"{message['role']}: {message['content']}", "", ""))
            kind = ""
        lines.append((kind, question["content"], before[i], after[i]))
    lines += [("", "", "", ""), ("right answers", "", "before", "after")]
    for kind in (*KINDS, "all"):
        chosen = [i for i, row in enumerate(rows) if kind in ("all", row["kind"])]
        lines.append((kind, "", *(share(solves, rows, r, chosen) for r in (before, after))))
    form = [share(prefers, rows, r, range(len(rows))) for r in (before, after)]
    lines.append(("in sentences", "right and in the form that DPO prefers", *form))
    widths = 15, 44, 18, 31
    return "\n".join(
        "  ".join(clip(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def share(test: Callable, rows: list[dict], replies: list[str], chosen: Sequence[int]) -> str:
    return f"{sum(test(rows[i]['answer'], replies[i]) for i in chosen) / len(chosen):.1%}"


def clip(text: str, width: int) -> str:
    """Exactly `width` characters of what an untrained model may have said."""
    text = "".join(c if c.isascii() and c.isprintable() else "·" for c in text)
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"
