"""What several test files start from: a tiny tokenizer like Llama's, a tiny Llama, a small file."""

import json
import random

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

WORDS = "red green blue one two three sum of the cat sat on a mat why not now then yes no".split()


def sentence(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 20)))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a `tokenizer.model` of Llama's kind, of some 320 pieces."""
    folder, rng = tmp_path_factory.mktemp("tokenizer"), random.Random(0)
    sentences = [f"<|user|> {sentence(rng)} <|assistant|> {sentence(rng)}" for _ in range(200)]
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return folder


@pytest.fixture(scope="session")
def base(tokenizer_folder, tmp_path_factory):
    """A Hugging Face folder: a random Llama (hidden 32, 2 layers, 4 heads, 2 key/value heads)."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    E, F, V, kv = 32, 48, 352, 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": E,
        "intermediate_size": F,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": V,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (V, E), "lm_head.weight": (V, E)}
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj": (E, E),
            "self_attn.k_proj": (kv, E),
            "self_attn.v_proj": (kv, E),
            "self_attn.o_proj": (E, E),
            "mlp.gate_proj": (F, E),
            "mlp.up_proj": (F, E),
            "mlp.down_proj": (E, F),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    tensors = {n: 0.1 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{norm}.weight"] = torch.ones(E)
        tensors[f"model.{norm}.weight".replace("layers.0", "layers.1")] = torch.ones(E)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """A file of 24 conversations of one to three turns, every fourth with a system message."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("data") / "conversations.jsonl"
    with open(path, "w") as file:
        for k in range(24):
            messages = [{"role": "system", "content": sentence(rng)}] if k % 4 == 0 else []
            for _ in range(1 + k % 3):
                messages.append({"role": "user", "content": sentence(rng)})
                messages.append({"role": "assistant", "content": sentence(rng)})
            record = {"dataset": "tiny", "id": f"tiny_{k}", "messages": messages}
            file.write(json.dumps(record) + "\n")
    return path
