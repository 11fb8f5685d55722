"""The demo: a tiny base model, a tokenizer, conversations and preference pairs, made on the spot.

`sft.py` and `dpo.py` run on it where neither `--model` nor `--data` is given, so that everything a
7B goes through can be watched in two minutes on a laptop, without a download:

    make() ──► base/                an untrained Llama of 0.9 million parameters, as an HF folder
               conversations.jsonl ──► sft.py ──► a model that solves the tasks
               preferences.jsonl   ──► dpo.py ──► a model that also answers in whole sentences
               held_out.jsonl      ──► answer(), show(): what each of them learned

The tasks are small, and a program can tell a right answer from a wrong one: words are picked from a
list or repeated, made-up words are spelled backwards, numbers are added; some conversations open
with a system message, some go on with a second question about the first. A right answer has two
forms, the bare one ("42") and a sentence ("The answer is 42."). The conversations leave the choice
open: questions mostly get the sentence and requests mostly the bare answer. The preference pairs
do not: the sentence is always the chosen one. So SFT shows as tasks solved, DPO as sentences.
"""

import io
import itertools
import json
import random
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

# What the demo sets instead of the paper's hyper-parameters (the flags of the two scripts): a model
# this small, that starts from nothing, wants short updates, many of them and a high learning rate.
SFT = {
    "epochs": 2,
    "batch_size": 32,
    "lr": 2.5e-3,
    "warmup_ratio": 0.1,
    "max_seq_len": 256,
    "micro_tokens": 4096,
}
DPO = {
    "epochs": 1,
    "batch_size": 32,
    "lr": 1e-4,
    "warmup_ratio": 0.1,
    "max_seq_len": 256,
    "micro_tokens": 4096,
}

CONVERSATIONS = 8_000
PAIRS = 4_000
HELD_OUT = 30  # of each kind
LO, HI = 2, 4
SEED = 2  # of everything made here; the order of training is --seed's

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 448,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

WORDS = {
    "animal": "ant dog fox hen yak".split(),
    "food": "egg jam nut pie lime".split(),
    "colour": "red blue gold white olive".split(),
    "vehicle": "car van tram ship kart".split(),
}
# Two questions and two requests for each task. The last {} is a list; after the first turn, "them".
TASKS = {
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
    """Whether `reply` is the right answer, in either of the two forms."""
    return reply in (answer, sentence(answer))


def conversation(rng):
    """One conversation up to its last answer, as a dict.

    kind: of task · items: what it is about · messages: up to the last question ·
    answer: the right answer to it · reply: the answer in the form that SFT shows
    """
    if rng.random() < 0.35:
        items = [str(digit) for digit in rng.sample(range(10), rng.randint(3, 4))]
        names, kind = {"largest number": max(items), "smallest number": min(items)}, "numbers"
    else:
        names, kind = {name: rng.choice(WORDS[name]) for name in rng.sample(list(WORDS), 3)}, "words"
        items = rng.sample(list(names.values()), 3)
    capitals = kind == "words" and rng.random() < 0.4
    messages = [CAPITALS] if capitals else []
    spoken = " ".join(items)
    for turn in range(rng.randint(1, 3)):
        if turn:
            messages.append({"role": "assistant", "content": reply})
        task, phrasing = rng.choice(list(TASKS)), rng.randrange(4)
        name = rng.choice(list(names))
        answer = names[name] if task == "pick" else " ".join(sorted(items))
        answer = answer.upper() if capitals else answer
        about = (name, spoken) if task == "pick" else (spoken,)
        messages.append({"role": "user", "content": TASKS[task][phrasing].format(*about)})
        # Undecided: four of five questions get a sentence, and one of five requests.
        reply = sentence(answer) if rng.random() < (0.8 if phrasing < 2 else 0.2) else answer
        spoken = "them"
    if turn:
        kind = "later turn"
    elif capitals:
        kind = "system message"
    else:
        kind = f"{task} {kind}"
    return {"kind": kind, "items": " ".join(items), "messages": messages, "answer": answer, "reply": reply}


def make(folder: Path) -> None:
    """Write base model, conversations, preference pairs and held-out prompts into `folder`.

    The same bytes every time. What a held-out prompt is about (its words or numbers) occurs in no
    conversation and no pair, in whatever phrasing.
    """
    rng = random.Random(SEED)
    drawn = iter(lambda: conversation(rng), None)
    held_out = {kind: [] for kind in KINDS}
    while any(len(rows) < HELD_OUT for rows in held_out.values()):
        row = next(drawn)
        if len(held_out[row["kind"]]) < HELD_OUT:
            held_out[row["kind"]].append(row)
    held_out = [row for rows in held_out.values() for row in rows]
    kept = {row["items"] for row in held_out}
    fresh = (row for row in drawn if row["items"] not in kept)
    conversations = [
        {"dataset": "demo", "id": f"demo_{i}", "messages": [*row["messages"], assistant(row["reply"])]}
        for i, row in enumerate(itertools.islice(fresh, CONVERSATIONS))
    ]
    pairs = [
        {
            "prompt": row["messages"][-1]["content"],
            "prompt_id": f"demo_{i}",
            "chosen": [*row["messages"], assistant(sentence(row["answer"]))],
            "rejected": [*row["messages"], assistant(row["answer"])],
        }
        for i, row in enumerate(itertools.islice(fresh, PAIRS))
    ]
    folder = Path(folder)
    (folder / "base").mkdir(parents=True, exist_ok=True)
    files = {"conversations": conversations, "preferences": pairs, "held_out": held_out}
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    write_tokenizer(folder / "base", conversations)
    write_model(folder / "base")


def assistant(content):
    return {"role": "assistant", "content": content}


@torch.no_grad()
def answer(model, tokenizer, prompts: list[list[dict]], max_new_tokens: int = 32) -> list[str]:
    """Greedy answers to all prompts at once: one packed row, a full forward pass for every token.

    Simple rather than fast (generate.py keeps keys and values instead). Where the model is sharded,
    every rank calls this with the same prompts, and then all of them run equally many passes.
    """
    device = next(model.parameters()).device
    sequences = [tokenizer.prompt(messages) for messages in prompts]
    replies = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        lengths = torch.tensor([len(sequences[i]) for i in active])
        ends = lengths.cumsum(0)
        row = torch.tensor([token for i in active for token in sequences[i]])
        doc_start = (ends - lengths).repeat_interleave(lengths).int()
        logits = model(row.to(device), doc_start.to(device), (ends - 1).to(device))
        chosen = dict(zip(active, logits.argmax(-1).tolist(), strict=True))
        active = [i for i in active if chosen[i] != tokenizer.eos_id]
        if not active:
            break
        for i in active:
            sequences[i].append(chosen[i])
            replies[i].append(chosen[i])
    return [tokenizer.decode(reply) for reply in replies]


def held_out_prompts(folder: Path) -> list[dict]:
    """The held-out prompts of `make`: `kind`, `messages` up to the last user turn, `answer`."""
    lines = (Path(folder) / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def exact_match(held_out: list[dict], replies: list[str]) -> float:
    """The share of replies that are right, in either form."""
    right = [solves(row["answer"], reply) for row, reply in zip(held_out, replies, strict=True)]
    return sum(right) / len(right)


def preferred(held_out: list[dict], replies: list[str]) -> float:
    """The share of replies that are right and in the preferred form."""
    right = [reply == sentence(row["answer"]) for row, reply in zip(held_out, replies, strict=True)]
    return sum(right) / len(right)


def show(held_out: list[dict], before: list[str], after: list[str]) -> None:
    """Print a prompt of each kind with its answers before and after, then the rates."""
    def line(*cells):
        print(f"{cells[0]:<16}{cells[1]:<40}{cells[2]:<28}{cells[3]}")

    def clip(text, width):
        text = "".join(c if c.isprintable() else "·" for c in text.replace("\ufffd", "·"))
        return text if len(text) <= width else text[: width - 1] + "…"

    kinds = {}
    for row, *replies in zip(held_out, before, after, strict=True):
        kinds.setdefault(row["kind"], []).append((row, *replies))
    line("held-out", "prompt", "before", "after")
    for kind, rows in kinds.items():
        row, *replies = rows[0]
        for message in row["messages"][:-1]:
            line(kind, clip(f"{message['role']}: {message['content']}", 39), "", "")
            kind = ""
        prompt = clip(row["messages"][-1]["content"], 39)
        line(kind, prompt, *(clip(reply, 27) for reply in replies))
    print()
    line("right answers", "", "before", "after")
    for kind, rows in kinds.items():
        asked, *both = zip(*rows, strict=True)
        line(kind, "", *(f"{exact_match(asked, replies):.0%}" for replies in both))
    line("all", "", *(f"{exact_match(held_out, replies):.1%}" for replies in (before, after)))
    line("in a sentence", "", *(f"{preferred(held_out, replies):.1%}" for replies in (before, after)))


def write_tokenizer(folder, conversations):
    """A SentencePiece BPE model with byte fallback, with the settings of Llama 2's."""
    text = (
        line
        for conversation in conversations[:4000]
        for message in conversation["messages"]
        for line in (f"<|{message['role']}|>", message["content"])
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_model(folder):
    """A Llama that knows nothing: normal(0, 0.02) everywhere, as LLaMA starts, norms at one."""
    hidden, mlp = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[block + name] = shape
    shapes["model.norm"] = (hidden,)
    shapes["lm_head"] = (CONFIG["vocab_size"], hidden)
    generator = torch.Generator().manual_seed(SEED)
    std = CONFIG["initializer_range"]
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * std
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
