"""The eleven sources of the Tulu V2 mixture: their records as conversations, and their counts.

`mixture.py` reads the raw files and calls a source's converter on every record, with the source's
random stream. A converter yields conversations: `messages`, and an `id` or a `dataset` where the
source has its own. Where the original leaves something out, it yields the reason, a text, to be
counted. It raises `InputError` for a record of another schema. `SOURCES`, at the end, is the table
of facts.

Rules and quirks follow open-instruct at 60ceefa, `open_instruct/reformat_datasets.py` and
`scripts/split_sharegpt_conversations.py`; the counts are the paper's (arXiv 2311.10702) before the
keyword filter, and those of the released data set after it.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from program.errors import InputError, amount

SHAREGPT_LIMIT = 4096  # tokens of a chunk, as in the command that was run; the paper says 4,196
ROLE_TOKENS = 6  # counted for every message beside its own


@dataclass(frozen=True)
class Source:
    name: str  # the conversations' `dataset`, and the beginning of their `id`
    files: tuple[str, ...]  # the raw files, under their published names
    where: str  # where they are published
    convert: Callable  # (record, random stream) -> conversations and reasons
    before: int  # published number of conversations before the keyword filter
    after: int  # and after it
    sample: int = 0  # rows drawn at random from each file; 0: every row
    repeat: int = 1  # how often the whole source is written


def checked(value: object, what: str, *kinds: type) -> Any:
    """The value; raises `InputError` if it is none of `kinds`, or text that UTF-8 cannot hold."""
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{what} is {type(value).__name__}, expected {expected}")
    if type(value) is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{what} holds half a surrogate pair, expected Unicode text") from None
    return value


def field(record: object, name: str, *kinds: type) -> Any:
    """`record[name]`, checked."""
    if name not in checked(record, f"what should hold {name!r}", dict):
        raise InputError(f"no field {name!r} (there are: {', '.join(map(str, record))})")
    return checked(record[name], f"field {name!r}", *kinds)


def chat(*texts: str) -> list[dict]:
    """Messages by the user and the assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def flan(record: dict, _stream: Random) -> Iterator[dict | str]:
    """FLAN v2 and its chain-of-thought part; a prompt ends in a newline or a colon."""
    prompt = field(record, "inputs", str)
    if not prompt.endswith("\n") and not prompt.rstrip().endswith(":"):
        prompt += "\n"
    yield {"messages": chat(prompt, field(record, "targets", str))}


def oasst1(record: dict, _stream: Random) -> Iterator[dict | str]:
    """Open Assistant: the path from the first prompt that takes the best reply at every message.

    Deleted messages do not count. The path is kept only if it ends in an answer without replies,
    not if it ends in a prompt without an answer, or in an answer whose replies are all deleted.
    """
    messages, nodes, role = [], [field(record, "prompt", dict)], None
    while alive := [node for node in nodes if not field(node, "deleted", bool)]:
        node = max(alive, key=oasst1_quality)  # the first of equals
        role, nodes = field(node, "role", str), field(node, "replies", list)
        if role not in ("prompter", "assistant"):
            raise InputError(f"role {role!r}, expected 'prompter' or 'assistant'")
        speaker = "user" if role == "prompter" else "assistant"
        messages.append({"role": speaker, "content": field(node, "text", str)})
        if role == "assistant" and not nodes:
            yield {"messages": messages}
            return
    yield {
        None: "trees whose first prompt is deleted",
        "prompter": "trees whose best path ends in a prompt without an answer",
        "assistant": "trees whose best path ends in an answer with only deleted replies",
    }[role]


def oasst1_quality(node: dict) -> float:
    """The mean of the reviewers' quality marks; 0 for a message without any."""
    labels = field(node, "labels", dict) if "labels" in node else {}
    if "quality" not in labels:
        return 0.0
    return field(field(labels, "quality", dict), "value", float, int)


def lima(record: dict, _stream: Random) -> Iterator[dict | str]:
    """LIMA: a list of texts by the user and the assistant in turn."""
    texts = [checked(text, "a message", str) for text in field(record, "conversations", list)]
    if len(texts) < 2:
        found = amount(len(texts), "messages")
        raise InputError(f"{found}, expected at least a prompt and an answer")
    if len(texts) % 2:
        yield "last messages without an answer, cut off"
    yield {"messages": chat(*texts[: len(texts) // 2 * 2])}


def alpaca(record: dict, stream: Random) -> Iterator[dict | str]:
    """GPT4-Alpaca and Code-Alpaca: instruction and input, in a template drawn by weight."""
    instruction, answer = field(record, "instruction", str), field(record, "output", str)
    context = (field(record, "input", str, type(None)) or "").strip()
    templates = WITH_INPUT if context else WITHOUT_INPUT
    slots = [template for weight, *template in templates for _ in range(weight)]
    prompt, lead = slots[int(stream.random() * len(slots))]
    prompt = prompt.format(I=instruction.strip(), X=context)
    yield {"messages": chat(prompt, lead + answer.strip())}


# Weight in twentieths, prompt, text before the answer. Weights and structure are the original's;
# the sentences are ours. "Plase" is no slip of ours: one template of the original has it, and so
# had 1 in 20 of the prompts without input that Tulu 2 was trained on.
WITH_INPUT = (
    (4, "{I}\n\n{X}\n\n", ""),
    (2, "{I}\n{X}\n\n", ""),
    (2, "{I}\n{X}\n", ""),
    (
        2,
        "This is a task, together with an input that it is to be done on. Give the answer.\n\n"
        "### Instruction:\n{I}\n\n### Input:\n{X}\n\n### Response:",
        "",
    ),
    (1, "{I}\n\nInput: {X}\n\nOutput:", ""),
    (1, "{I}\nInput: {X}\nOutput:", ""),
    (1, "{I}\n{X}\n\nResponse:", ""),
    (1, "{I}\n\nAdditional Context:\n{X}\n\nAnswer:", ""),
    (1, "Task: {I}\nInput: {X}\nOutput:", ""),
    (1, "Task: {I}\n\n{X}\n\n", ""),
    (1, "Task: {I}\n\n{X}\n\nAnswer:", ""),
    (1, "Here is what has to be done:\n\n{I}\n\n{X}\n\nAnswer:", ""),
    (1, "{I}\n\nDo this for the case below -\nInput: {X}\nOutput:", ""),
    (1, "Instruction:{I}\n\nInput: {X}\n\n", ""),
)
WITHOUT_INPUT = (
    (4, "{I}\n\n", ""),
    (2, "{I}\n", ""),
    (2, "{I}", "\n"),
    (2, "Give the answer to this task.\n\n### Instruction:\n{I}\n\n### Response:", ""),
    (1, "{I} Output:", ""),
    (1, "{I}\nResponse:", ""),
    (1, "{I}\n\nAnswer:", ""),
    (1, "Task: {I}\n\n", ""),
    (1, "Instruction: {I}\n", ""),
    (1, "Instruction: {I}\nOutput:", ""),
    (1, "Here is what has to be done:\n\n{I}\n\n", ""),
    (1, "Could you do this for me?\n\n{I}\n", ""),
    (1, "Plase reply to this: {I}\nAnswer:", ""),
    (1, "What would you say to a request like this one?\n{I}\n", ""),
)


def sharegpt(record: dict, _stream: Random) -> Iterator[dict | str]:
    """ShareGPT: split into chunks of whole pairs of messages of at most `SHAREGPT_LIMIT` tokens.

    `tokens`, the number of tokens of each message, is added by `mixture.py`. The split is greedy
    and has the original's quirks. A pair that is too long for a chunk is skipped; it makes `room`
    negative, so that the next pair always begins a new chunk. A chunk is only closed by a later
    pair or by a last pair that fits, so a last pair that does not fit is lost.
    """
    turns, tokens = record["conversations"], record["tokens"]
    end = len(turns) // 2 * 2
    if end == 0:
        yield "conversations of fewer than two messages"
    elif end < len(turns):
        yield "last messages without a counterpart, cut off"
    chunks, first, room, fits = [], 0, SHAREGPT_LIMIT, True
    for i in range(0, end, 2):
        pair = tokens[i] + tokens[i + 1] + 2 * (1 + ROLE_TOKENS)  # 1: BOS
        fits = pair <= room
        if not fits:
            chunks.append((first, i))
            first, room = (i, SHAREGPT_LIMIT) if pair <= SHAREGPT_LIMIT else (i + 2, SHAREGPT_LIMIT)
        if pair > SHAREGPT_LIMIT:
            yield f"pairs of more than {SHAREGPT_LIMIT} tokens, skipped"
        room -= pair
    if fits:
        chunks.append((first, end))
    elif first < end:
        yield "last pairs that did not fit, lost"
    for first, end in chunks:
        senders = [turn["from"] for turn in turns[first:end]]
        if {"system", "bing"} & set(senders):
            yield "chunks with a message from 'system' or 'bing'"
        elif senders != ["human", "gpt"] * (len(senders) // 2):
            yield "chunks in which 'human' and 'gpt' do not alternate"
        elif senders:
            messages = chat(*(turn["value"] for turn in turns[first:end]))
            yield {"id": f"sharegpt_{record['id']}_{first}", "messages": messages}


def sharegpt_texts(record: dict) -> list[str]:
    """The texts of a raw ShareGPT record; checks its fields."""
    field(record, "id", str)
    turns = field(record, "conversations", list)
    for turn in turns:
        field(turn, "from", str)
    return [field(turn, "value", str) for turn in turns]


def wizardlm(record: dict, _stream: Random) -> Iterator[dict | str]:
    """WizardLM Evol-Instruct V2."""
    turns = field(record, "conversations", list)
    senders = [field(turn, "from", str) for turn in turns]
    if not senders or senders != ["human", "gpt"] * (len(senders) // 2):
        raise InputError(f"messages from {senders}, expected 'human' and 'gpt' in turn")
    messages = chat(*(field(turn, "value", str) for turn in turns))
    yield {"id": f"wizardlm_{field(record, 'idx', str, int)}", "messages": messages}


def open_orca(record: dict, _stream: Random) -> Iterator[dict | str]:
    """Open-Orca: always with a system message, even if empty."""
    system = {"role": "system", "content": field(record, "system_prompt", str)}
    messages = chat(field(record, "question", str), field(record, "response", str))
    yield {"id": f"open_orca_{field(record, 'id', str)}", "messages": [system, *messages]}


def science(record: dict, _stream: Random) -> Iterator[dict | str]:
    """The science tasks: each of them is a `dataset`."""
    messages = chat(field(record, "input", str), field(record, "output", str))
    yield {"dataset": f"science.{field(record, 'dataset', str)}", "messages": messages}


def hard_coded(record: dict, _stream: Random) -> Iterator[dict | str]:
    """Questions about Tulu itself, with the answers it should give."""
    prompt, answer = field(record, "Prompt", str), field(record, "Output", str)
    if not prompt.strip() or not answer.strip():
        raise InputError("'Prompt' or 'Output' is empty")
    yield {"messages": chat(prompt, answer)}


HUB = "huggingface.co/datasets/"
STORE = HUB + "hamishivi/tulu_mix_store"  # of one of the authors
SHAREGPT = HUB + "anon8231489123/ShareGPT_Vicuna_unfiltered, folder HTML_cleaned_raw_dataset"
WIZARDLM = HUB + "ai2-adapt-dev/wizardlm-backup, in parquet; the WizardLM authors' own is gone"
SHEET = STORE + " as hard_coded_examples.xlsx; export the sheet to CSV or JSON lines"
GPT4_LLM = "github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM, folder data"
CODE_ALPACA = "github.com/sahil280114/codealpaca, folder data"
OASST1_TREES = "2023-04-12_oasst_ready.trees.jsonl.gz"
SHAREGPT_PARTS = ("sg_90k_part1_html_cleaned.json", "sg_90k_part2_html_cleaned.json")
COT_PARTS = ("cot_zsopt.jsonl", "cot_fsopt.jsonl")  # zero-shot, few-shot
EVOL_V2 = "WizardLM_evol_instruct_V2_143k.json"

# In the order of the mixture.
SOURCES = (
    Source("flan_v2", ("flan_v2_resampled_50k.jsonl",), STORE, flan, 50_000, 49_123),
    Source("cot", COT_PARTS, STORE, flan, 50_000, 49_747, sample=25_000),
    Source("oasst1", (OASST1_TREES,), HUB + "OpenAssistant/oasst1", oasst1, 7_708, 7_331),
    Source("lima", ("train.jsonl",), HUB + "GAIR/lima, on request", lima, 1_030, 1_018),
    Source("gpt4_alpaca", ("alpaca_gpt4_data.json",), GPT4_LLM, alpaca, 20_000, 19_906, 20_000),
    Source("code_alpaca", ("code_alpaca_20k.json",), CODE_ALPACA, alpaca, 20_022, 20_016),
    Source("sharegpt", SHAREGPT_PARTS, SHAREGPT, sharegpt, 114_046, 111_912),
    Source("wizardlm", (EVOL_V2,), WIZARDLM, wizardlm, 30_000, 29_810, sample=30_000),
    Source(
        "open_orca",
        ("1M-GPT4-Augmented.parquet",),
        HUB + "Open-Orca/OpenOrca",
        open_orca,
        30_000,
        29_683,
        sample=30_000,
    ),
    Source("science", ("science_train.jsonl",), STORE, science, 7_544, 7_468),
    Source("hard_coded", ("hard_coded_examples.csv",), SHEET, hard_coded, 140, 140, repeat=10),
)

# Published conversations of each science task after the filter. Before it there were 1,678, 2,255,
# 919, 1,992 and, in both of scierc's, 700.
SCIENCE_TASKS = {
    "science.evidence_inference": 1_674,
    "science.qasper_truncated_4000": 2_218,
    "science.scifact_json": 919,
    "science.scitldr_aic": 1_959,
    "science.scierc_ner": 349,
    "science.scierc_relation": 349,
}
