"""What the benchmarks measure on: shapes of models, random weights, the first records of a file.

A model's shape is a dict by the names of config.json.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from program.errors import InputError
from tokens.documents import Documents
from tokens.tokenizer import Tokenizer


def shape(hidden_size, mlp, layers, heads, kv_heads):
    """The fields of config.json that differ between the models here."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


LLAMA_2_7B = shape(4096, 11008, 32, 32, 32)
TINY_LLAMA = shape(2048, 5632, 22, 32, 4)  # 1.1 B parameters
SMALL = shape(256, 688, 4, 4, 2)  # an update or an answer takes seconds on 2 CPU cores
TOY = shape(32, 88, 2, 2, 1)  # for rehearsals
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class InputFlags:
    """Flags of every benchmark that reads records."""

    data: str | None = None  # file of records (default: the one of $TULU_DATA that is named above)
    tokenizer: str | None = None  # folder of a tokenizer.model (default: Llama 2's of $TULU_DATA)
    seed: int = 42  # of the weights, and of the order of the data


def input_file(given, default, flag):
    """Path `given`, or `default` in $TULU_DATA; raises `InputError` where there is no such file."""
    shared = Path(os.environ.get("TULU_DATA", "../shared/data"))
    path = Path(given or shared / default)
    if not path.is_file():
        raise InputError(f"{flag}: {path}: no such file")
    return path


def copy_tokenizer(config, folder):
    """Copy the tokenizer.model that --tokenizer asks for into `folder`."""
    given = config.tokenizer and Path(config.tokenizer) / "tokenizer.model"
    shutil.copy(input_file(given, "llama2-tokenizer/tokenizer.model", "--tokenizer"), folder)


def model_fields(model_shape, folder):
    """config.json of a model of that shape for the tokenizer in `folder`."""
    return FIXED | model_shape | {"vocab_size": Tokenizer(folder).vocab_size}


def make_model(config, folder, model_shape=None):
    """Random weights, from which every loop starts, to `folder`; returns the model's config.json.

    model_shape: default SMALL, or TOY with --toy. `folder` holds the tokenizer already, and is a
    Hugging Face folder then.
    """
    import transformers

    torch.manual_seed(config.seed)
    fields = model_fields(model_shape or (TOY if config.toy else SMALL), folder)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
    return fields


def first_documents(config, default, records, folder, max_seq_len, encode_record, per_record=1):
    """The first `records` (None: all) of --data, or of `default` in $TULU_DATA, as `Documents`.

    They are written to data.jsonl in `folder`, and the tokenizer is copied there.
    """
    data = input_file(config.data, default, "--data")
    copy_tokenizer(config, folder)
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    first = Path(folder) / "data.jsonl"
    first.write_text("".join(lines[:records]), encoding="utf-8")
    return Documents([first], folder, max_seq_len, encode_record, per_record=per_record)
