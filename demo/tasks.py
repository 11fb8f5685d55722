"""The demo: a tiny base model, its tokenizer, conversations and preference pairs, made on the spot.

sft.py and dpo.py use them if neither --model nor --data is given. Everything that a 7B goes
through can be watched on a laptop in two minutes, without a download:

    make() ──► base/                a Llama that knows nothing, as a Hugging Face folder
               conversations.jsonl ──► sft.py ──► a model that solves the tasks
               preferences.jsonl   ──► dpo.py ──► a model that also answers in whole sentences
               held_out.jsonl      ──► compare(): what each of the two taught
               held_out_*.jsonl    ──► the same with answers: the loss on what is not trained

The tasks are small, and a program can tell right from wrong: pick the animal, or the largest
number, from a list; sort the list. Some conversations begin with a system message that changes
every answer. Some continue with more questions about the same list, which is then just "them".

A right answer has two forms: the bare word ("fox") and a sentence ("The answer is fox."). The
conversations use both: most questions get a sentence, most requests the bare word. In the
preference pairs the sentence is always the chosen answer. So the effect of SFT shows in the tasks
solved, and the effect of DPO in the form of the answers.
"""

import io
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from checkpoint.config import read_config
from model import Llama
from training.flags import DEMO

FOLDER = Path("runs/demo")

# Flags of sft.py and dpo.py in the demo. A model this small, and one that starts from nothing,
# wants many short updates and a hundred times the learning rate of a pre-trained 7B.
SFT = {
    "model": f"{FOLDER}/base",
    "data": [f"{FOLDER}/conversations.jsonl"],
    "eval_data": [f"{FOLDER}/held_out_conversations.jsonl"],
    "eval_every": 100,
    "out": DEMO["sft"],
    "epochs": 2,
    "batch_size": 32,
    "lr": 2.5e-3,
    "warmup_ratio": 0.1,
    "max_seq_len": 256,
    "micro_tokens": 4096,
}
DPO = SFT | {
    "model": DEMO["sft"],
    "data": [f"{FOLDER}/preferences.jsonl"],
    "eval_data": [f"{FOLDER}/held_out_preferences.jsonl"],
    "eval_every": 25,
    "out": DEMO["dpo"],
    "epochs": 1,
    "batch_size": 32,
    "lr": 4e-5,
    "micro_tokens": 8192,
}
# With --lora-rank: adapters start at nothing, and all that they learn is in so few numbers.
SFT_LORA = {"lr": 5e-3}
DPO_LORA = {"lr": 3e-4}

SEED = 2  # of all that is made here; --seed is that of the order of training
CONVERSATIONS = 8_000
PAIRS = 3_200
HELD_OUT = 20  # of each kind
LONGEST_ANSWER = 20  # tokens

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 544,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    # LLaMA's 0.02 suits a hidden size of thousands. With 128 the same tasks are learned later.
    "initializer_range": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

# No two words begin alike, which makes sorting them a matter of the first letter.
WORDS = {
    "animal": "ant dog fox hen yak".split(),
    "food": "egg jam nut pie lime".split(),
    "colour": "red blue gold white olive".split(),
    "vehicle": "car van tram ship kart".split(),
}
# Tried and dropped, as this model needs minutes to learn it: whatever depends on the order of the
# list (its first or last word, repeating it, turning it around).
TASKS = {  # two questions, then two requests; the last {} is the list
    "pick": (
        "What is the {} among {}?",
        "Can you name the {} among {}?",
        "Name the {} among {}.",
        "Pick the {} among {}.",
    ),
    "sort": ("Can you sort {}?", "What is the order of {}?", "Sort {}.", "Put {} in order."),
}
CAPITALS = {"role": "system", "content": "Answer in capitals."}
KINDS = ("pick words", "pick numbers", "sort words", "sort numbers", "system message", "later turn")


def sentence(answer: str) -> str:
    """The form of an answer that the preference pairs prefer."""
    return f"The answer is {answer}."


def solves(answer: str, reply: str) -> bool:
    """Whether `reply` is the right answer, in either form."""
    return reply in (answer, sentence(answer))


def prefers(answer: str, reply: str) -> bool:
    """Whether `reply` is right, and a sentence."""
    return reply == sentence(answer)


def conversation(rng: random.Random) -> dict:
    """kind: one of KINDS · about: the list · messages · answer: the right one at the end."""
    numbers = rng.random() < 0.35
    if numbers:
        items = [str(digit) for digit in rng.sample(range(10), rng.randint(3, 4))]
        names = {"largest number": max(items), "smallest number": min(items)}
    else:
        names = {name: rng.choice(WORDS[name]) for name in rng.sample(sorted(WORDS), 3)}
        items = rng.sample(sorted(names.values()), 3)
    capitals = not numbers and rng.random() < 0.4
    messages = [CAPITALS] if capitals else []
    about = spoken = " ".join(items)
    turns = rng.randint(1, 3)
    for _ in range(turns):
        task, phrasing = rng.choice(sorted(TASKS)), rng.randrange(4)
        if task == "pick":
            name = rng.choice(sorted(names))
            question, answer = TASKS[task][phrasing].format(name, spoken), names[name]
        else:
            question, answer = TASKS[task][phrasing].format(spoken), " ".join(sorted(items))
        answer = answer.upper() if capitals else answer
        # Left open: four of five questions get a sentence, and one of five requests.
        reply = sentence(answer) if rng.random() < (0.8 if phrasing < 2 else 0.2) else answer
        messages += [{"role": "user", "content": question}, assistant(reply)]
        spoken = "them"
    kind = f"{task} {'numbers' if numbers else 'words'}"
    if capitals or turns > 1:
        kind = "later turn" if turns > 1 else "system message"
    return {"kind": kind, "about": about, "messages": messages, "answer": answer}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def make(folder: Path = FOLDER) -> None:
    """Write the base model, conversations, preference pairs and held-out prompts into `folder`.

    The same bytes every time. A list that a held-out prompt is about occurs in no conversation and
    in no pair, whatever the question.
    """
    rng = random.Random(SEED)
    drawn = iter(lambda: conversation(rng), None)
    held_out = []
    for kind in KINDS:
        of_kind = (row for row in drawn if row["kind"] == kind)
        held_out += itertools.islice(of_kind, HELD_OUT)
    lists = {row["about"] for row in held_out}
    fresh = (row for row in drawn if row["about"] not in lists)
    conversations = as_conversations(itertools.islice(fresh, CONVERSATIONS))
    pairs = as_pairs(itertools.islice(fresh, PAIRS))
    prompts = [row | {"messages": row["messages"][:-1]} for row in held_out]

    base = Path(folder) / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_lines(base.parent / "held_out.jsonl", prompts)
    write_lines(base.parent / "held_out_conversations.jsonl", as_conversations(held_out))
    write_lines(base.parent / "held_out_preferences.jsonl", as_pairs(held_out))
    write_lines(base.parent / "conversations.jsonl", conversations)
    write_lines(base.parent / "preferences.jsonl", pairs)
    make_tokenizer(base, conversations)
    make_model(base)


def as_conversations(rows: Iterable[dict]) -> list[dict]:
    """The records that SFT takes."""
    return [
        {"dataset": "demo", "id": f"demo_{i}", "messages": row["messages"]}
        for i, row in enumerate(rows)
    ]


def as_pairs(rows: Iterable[dict]) -> list[dict]:
    """The records that DPO takes: the sentence is chosen, the bare word rejected."""
    pairs = []
    for i, row in enumerate(rows):
        *context, _ = row["messages"]
        chosen, rejected = assistant(sentence(row["answer"])), assistant(row["answer"])
        pair = {"prompt": context[-1]["content"], "prompt_id": f"demo_{i}"}
        pairs.append(pair | {"chosen": [*context, chosen], "rejected": [*context, rejected]})
    return pairs


def write_lines(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_tokenizer(folder: Path, conversations: list[dict]) -> None:
    """A SentencePiece BPE model with byte fallback, made with the settings of Llama 2's."""
    texts = (
        text
        for conversation in conversations[:4000]
        for message in conversation["messages"]
        for text in (f"<|{message['role']}|>", message["content"])
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,  # its log is a page long
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_model(folder: Path) -> None:
    """Random weights, norms at one."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model = Llama(read_config(folder))
    generator = torch.Generator().manual_seed(SEED)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=CONFIG["initializer_range"], generator=generator)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
