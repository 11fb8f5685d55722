"""What the tests share: a tiny tokenizer, base model and conversations, made on the spot; the real
data, where it is there; and what a machine without a GPU needs."""

import os

# Several test processes share the cores: one thread in each, and in what they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from program import threads  # noqa: F401, before torch

# isort: split
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

# Without a GPU Triton's interpreter runs the kernels; it has to know before the first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# `pytest -m core`, a minute: the inner circle is right. Whole files, and single tests of others.
CORE = (
    "tests/test_structure.py",
    "tests/test_model.py",  # logits equal transformers', packed as alone
    "tests/test_data.py",  # updates and packed rows
    "tests/kernels/test_attention.py",
    "tests/kernels/test_cross_entropy.py",
    "tests/tokens/test_tokenizer.py::test_ids_equal_transformers_with_a_tiny_tokenizer",
    "tests/tokens/test_tokenizer.py::test_content_and_eos_of_every_answer_are_trained",
    "tests/tokens/test_tokenizer.py::test_one_conversation_token_by_token",
    "tests/training/test_update.py",
    "tests/training/test_reference.py::test_packed_answers_have_transformers_log_probabilities",
    "tests/test_sft.py::test_three_updates_on_two_ranks_equal_a_plain_transformers_loop",
    "tests/test_dpo.py::test_loss_of_five_numbers",
    "tests/test_dpo.py::test_loss_starts_at_ln_2_and_survives_large_margins",
    "tests/test_dpo.py::test_gradient_has_the_closed_form",
    "tests/test_dpo.py::test_only_the_last_answer_is_trained",
    "tests/test_dpo.py::test_three_updates_on_two_ranks_equal_a_plain_transformers_loop",
    "tests/checkpoint/test_crash.py::test_stopped_by_signals",  # and resumed, bit for bit
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Mark the core. Skip what needs a GPU where there is none; else the kernels run there."""
    gpu = torch.cuda.is_available()
    for item in items:
        if item.nodeid.split("[")[0].startswith(CORE):
            item.add_marker("core")
        if gpu and item.get_closest_marker("kernel"):
            item.add_marker("gpu")
        if not gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


ROOT = Path(__file__).parent.parent


def run_program(name, *flags, ranks=None):
    """Run a script of ours, under torchrun where `ranks` is given; its standard output."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, name, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[:2000]
    return done.stdout


def updates(out):
    """The records of the updates in the metrics.jsonl of a run."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "step" in record and "event" not in record]


@pytest.fixture(autouse=True)
def same_signals():
    """A run in this process watches for signals; put the handlers back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    streams = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = streams
    for number, handler in before.items():
        signal.signal(number, handler)


SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "<|user|> What is 2 plus 2? <|assistant|> The answer is 4.",
    "<|system|> You are a helpful assistant. <|user|> Reverse the word: hello",
    "def add(a, b):    return a + b        # four and eight spaces",
    "Größe, naïve café, über alles; ----====####....",
    "for i in range(10):  print(i ** 2)",
]


def train_tokenizer(folder, **changes):
    """Write `folder/tokenizer.model`, made as Llama's was except for `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "model_type": "bpe",
        "vocab_size": 360,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        **options | changes,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Folder of a tiny tokenizer.model of Llama's kind, and nothing else."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_folder):
    """Folder of a tiny random Llama with its tokenizer, as Hugging Face would lay it out."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    hidden, mlp, layers, heads, kv_heads, vocab = 32, 88, 2, 4, 2, 361  # odd, to be cut in two
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden // heads * kv_heads
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{n}_proj": (hidden, hidden) for n in "qo"}
        shapes |= {prefix + f"self_attn.{n}_proj": (kv, hidden) for n in "kv"}
        shapes |= {prefix + f"mlp.{n}_proj": (mlp, hidden) for n in ("gate", "up")}
        shapes[prefix + "mlp.down_proj"] = (hidden, mlp)
        shapes |= {prefix + n: (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory, tokenizer_folder):
    """Folder of a random Llama in fp32 of which NF4 takes all widths, written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 361}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("wide") / "base"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5, initializer_range=0.1))
    model.save_pretrained(folder)
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def lively(tmp_path_factory, base):
    """`base` with matrices six times as large: its greedy answers vary with the prompt."""
    folder = tmp_path_factory.mktemp("lively")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    weights = load_file(base / "model.safetensors")
    weights = {name: w * 6 if w.dim() == 2 else w for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """Path of a jsonl of 24 conversations of one to four turns and various lengths."""
    rng = random.Random(0)
    words = " ".join(SENTENCES).split()
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(24):
            messages = [{"role": "system", "content": "Be brief."}] if i % 5 == 0 else []
            for _ in range(1 + i % 4):
                for role, most in (("user", 12), ("assistant", 3 + 2 * i)):
                    content = " ".join(rng.choices(words, k=rng.randint(1, most)))
                    messages.append({"role": role, "content": content})
            record = {"dataset": "made up", "id": f"made-up-{i}", "messages": messages}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """Path of 19 pairs of various lengths, some with several turns before the answer."""
    from pairs import message, pair, write

    rng, words = random.Random(5), "the quick brown fox answers no more questions today".split()

    def text(most):
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    records = []
    for k in range(19):
        prompt = [message("user", text(9))]
        if k % 3 == 0:
            prompt += [message("assistant", text(9)), message("user", text(9))]
        records.append(pair(prompt, text(3 + 2 * k), text(12), prompt_id=f"p{k}"))
    return write(tmp_path_factory.mktemp("pairs") / "preferences.jsonl", records)


@pytest.fixture(scope="session")
def uninterrupted(base, conversations, tmp_path_factory):
    """The output folder of a run of sft.py that nothing befell (see harm.py)."""
    from harm import harmed, recipe

    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert harmed(recipe(base, conversations, out)) == 0
    return out


@pytest.fixture
def refused(base, conversations, tmp_path):
    """`refused(flag=value, …)`: the error of a run on good input but for these flags.

    Checks that it is one line, and that nothing has appeared where the run would write.
    """

    import sft
    from program.errors import InputError

    def run(**flags):
        out = tmp_path / "out"
        flags = {"model": str(base), "data": [str(conversations)], "out": str(out)} | flags
        before = listing(tmp_path)
        with pytest.raises(InputError) as caught:
            sft.main(flags)
        if Path(flags["out"]) == out:
            assert not out.exists()
        assert listing(tmp_path) == before, "a refused run wrote something"
        return str(caught.value)

    return run


def listing(folder):
    """Every file and folder below, but for token caches: those may stay, they are whole."""
    return sorted(p for p in folder.rglob("*") if ".tokens-" not in str(p) or p.suffix == ".lock")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data (see its README); the test is skipped where it is absent."""
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("TULU_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder} (TULU_DATA names the folder)")
    return folder
