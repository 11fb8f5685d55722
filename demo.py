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
    "lr": 3e-3,
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

CONVERSATIONS = 20_000
PAIRS = 4_000
HELD_OUT = 30  # of each kind
LO, HI = 2, 4
SEED = 2  # of everything made here; the order of training is --seed's

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 480,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

WORDS = """ant bee cat dog fox hen owl pig rat bus car jet van cup jar lid mug pan bed rug
egg fig jam pea sun sky""".split()

# For each kind of task two questions, then two requests.
PHRASINGS = {
    "first word": (
        "Which word comes first in {}?",
        "What is the first word of {}?",
        "Give the first word of {}.",
        "Name the word that comes first in {}.",
    ),
    "last word": (
        "Which word comes last in {}?",
        "What is the last word of {}?",
        "Give the last word of {}.",
        "Name the word that comes last in {}.",
    ),
    "repeat": ("Can you repeat {}?", "Could you say {} again?", "Repeat {}.", "Say {} again."),
    "backwards": ("What is {} backwards?", "Can you turn {} around?", "Say {} backwards.", "Turn {} around."),
    "sum": ("What is {} plus {}?", "How much is {} and {}?", "Add {} and {}.", "Sum {} and {}."),
}
FOLLOW_UP = ("And the {} one?", "What about the {} one?", "Now the {} one.", "The {} one too.")
CAPITALS = "Answer in capitals."
KINDS = (*PHRASINGS, "system message", "second turn")


def sentence(answer: str) -> str:
    """The form of an answer that the preference pairs prefer."""
    return f"The answer is {answer}."


def solves(answer: str, reply: str) -> bool:
    """Whether `reply` is the right answer, in either of the two forms."""
    return reply in (answer, sentence(answer))


def task(rng, kind):
    """What is asked about, and the right answer to it: a tuple of texts, and a text."""
    if kind == "sum":
        a, b = rng.randint(10, 89), rng.randint(1, 9)
        return (str(a), str(b)), str(a + b)
    words = rng.sample(WORDS, rng.randint(LO, HI))
    about = (" ".join(words),)
    if kind == "backwards":
        return about, " ".join(reversed(words))
    return about, {"first word": words[0], "last word": words[-1], "repeat": about[0]}[kind]


def example(rng, kind):
    """A prompt of this kind, what it is about, the right answer, and the form SFT shows it in."""
    messages = []
    base = kind
    if kind in ("system message", "second turn"):
        base = rng.choice(("first word", "last word", "repeat")[: 3 if kind[1] == "y" else 2])
    about, answer = task(rng, base)
    phrasing = rng.randrange(4)
    messages.append({"role": "user", "content": PHRASINGS[base][phrasing].format(*about)})
    if kind == "system message":
        messages.insert(0, {"role": "system", "content": CAPITALS})
        answer = answer.upper()
    if kind == "second turn":
        messages.append({"role": "assistant", "content": styled(rng, answer, phrasing)})
        end, pick = ("last", -1) if base == "first word" else ("first", 0)
        phrasing = rng.randrange(4)
        messages.append({"role": "user", "content": FOLLOW_UP[phrasing].format(end)})
        answer = about[0].split()[pick]
    return messages, about, answer, styled(rng, answer, phrasing)


def styled(rng, answer, phrasing):
    """Undecided: four of five questions get a sentence, and one of five requests."""
    return sentence(answer) if rng.random() < (0.8 if phrasing < 2 else 0.2) else answer


def make(folder: Path) -> None:
    """Write base model, conversations, preference pairs and held-out prompts into `folder`.

    The same bytes every time. What a held-out prompt is about (its words or numbers) occurs in no
    conversation and no pair, in whatever phrasing.
    """
    rng = random.Random(SEED)
    held_out, kept = [], set()
    for kind in KINDS:
        for _ in range(HELD_OUT):
            messages, about, answer, _ = example(rng, kind)
            held_out.append({"kind": kind, "messages": messages, "answer": answer})
            kept.add(about)

    def fresh(count):
        while count:
            messages, about, answer, reply = example(rng, rng.choice(KINDS))
            if about not in kept:
                count -= 1
                yield messages, answer, reply

    conversations = [
        {"dataset": "demo", "id": f"demo_{i}", "messages": [*messages, assistant(reply)]}
        for i, (messages, _, reply) in enumerate(fresh(CONVERSATIONS))
    ]
    pairs = [
        {
            "prompt": messages[-1]["content"],
            "prompt_id": f"demo_{i}",
            "chosen": [*messages, assistant(sentence(answer))],
            "rejected": [*messages, assistant(answer)],
        }
        for i, (messages, answer, _) in enumerate(fresh(PAIRS))
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
