"""A tiny base whose widths NF4 takes, and a model of ours with adapters on it."""

import json
import shutil

import pytest
import torch

# Widths that are multiples of 64, no powers of two; grouped-query attention; an odd vocabulary.
SHAPE = dict(
    vocab_size=361, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
    max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="session")
def wide(tmp_path_factory, tokenizer_folder):
    """Folder of a random Llama in fp32, written by transformers, with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)).save_pretrained(folder)
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def flags():
    """`flags(**changes)`: what adapters ask of a run's configuration."""
    from types import SimpleNamespace

    def make(**changes):
        values = dict(lora_rank=5, lora_alpha=7.0, lora_dropout=0.0, quantize=None, seed=3)
        return SimpleNamespace(**(values | {"dtype": "float32"} | changes))

    return make


@pytest.fixture(scope="session")
def adapted(wide, flags):
    """`adapted(stir=…, **flags)`: a model with adapters on `wide`; stir: B is not zero."""
    from adapters.lora import put_in
    from checkpoint.config import read_config
    from checkpoint.weights import load_hf
    from model import Llama

    def make(stir=False, folder=wide, **changes):
        config = flags(**changes)
        with torch.device("meta"):
            model = Llama(read_config(folder, quantized=bool(config.quantize)))
        model.dropout_of_adapters = put_in(model, config)
        model.to_empty(device="cpu")
        load_hf(model, folder)
        if stir:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if ".lora_B" in name:
                    parameter.data.normal_(std=0.05, generator=generator)
        return model

    return make


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
