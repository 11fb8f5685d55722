"""Model folders that will not do: one line says which file and field, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft
from program.errors import InputError


@pytest.fixture
def model(base, tmp_path):
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def change_config(**fields):
    def change(folder):
        values = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(values))

    return change


def change_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def write(name, content):
    """Put another content into a file, or none there (None)."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def shards(weight_map):
    """An index with this weight map instead of the one file."""

    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def cut_short(name, size):
    return lambda folder: os.truncate(folder / name, size)


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")


NORM = "model.norm.weight"
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "breakage, expected",
    [
        (write("config.json", None), "config.json: no such file, expected a Hugging Face Llama"),
        (write("config.json", b"{"), "config.json: not JSON"),
        (write("config.json", b"\xff"), "config.json: not JSON"),
        (write("config.json", b"[1]"), "config.json: found a JSON list, expected an object"),
        (change_config(model_type="mistral"), "config.json: model_type is 'mistral', only 'llama'"),
        (change_config(model_type=None), "config.json: model_type is None, only 'llama'"),
        (change_config(hidden_act="gelu"), "hidden_act is 'gelu', only 'silu' is implemented"),
        (change_config(attention_bias=True), "attention_bias is True, only False"),
        (change_config(mlp_bias=True), "mlp_bias is True, only False"),
        (change_config(attention_dropout=0.1), "attention_dropout is 0.1, only 0"),
        (change_config(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
        (
            change_config(rope_scaling={"type": "linear", "factor": 2}),
            "rope_scaling.type is 'linea",
        ),
        (change_config(rope_scaling=LINEAR), "rope_scaling.rope_type is 'linear', only 'default'"),
        (change_config(rope_scaling={"factor": 2.0}), "rope_scaling.factor is 2.0, only 1 is im"),
        (
            change_config(rope_scaling={"rope_type": "default", "rope_theta": 1 << 70}),
            "rope_theta is 1180591620717411303424, expected a positive number",
        ),
        (change_config(rope_parameters={"a": {"rope_theta": 5.0}}), "rope_parameters.a is {"),
        (change_config(rope_parameters={"rope_theta": None}), "rope_theta is None, expected a pos"),
        (change_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, only 1 or 1"),
        (change_config(attention_bias=None), "attention_bias is None, only False"),
        (change_config(attention_bias=0), "attention_bias is 0, only False"),
        (change_config(initializer_range=None), "initializer_range is None, expected a number"),
        (change_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected at m"),
        (change_config(rms_norm_eps=1), "rms_norm_eps is 1, expected a positive number"),
        (change_config(rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
        (change_config(rope_parameters=LINEAR), "rope_parameters.rope_type is 'linear'"),
        (change_config(rope_parameters=[1]), "rope_parameters is [1], expected an object"),
        (change_config(rope_parameters={"rope_theta": "x"}), "rope_theta is 'x', expected a pos"),
        (change_config(hidden_size="32"), "hidden_size is '32', expected a positive integer"),
        (change_config(hidden_size=32.0), "hidden_size is 32.0, expected a positive integer"),
        (change_config(hidden_size=None), "hidden_size is None, expected a positive integer"),
        (change_config(vocab_size=-1), "vocab_size is -1, expected a positive integer"),
        (change_config(num_hidden_layers=True), "num_hidden_layers is True, expected a positive"),
        (change_config(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected a positive"),
        (change_config(rope_theta=float("inf")), "rope_theta is inf, expected a positive number"),
        (change_config(num_attention_heads=5), "hidden_size 32 is no multiple of num_attention_h"),
        (change_config(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_"),
        (change_config(head_dim=7), "head_dim is 7, rotary embedding needs pairs"),
        (change_config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
        (change_config(vocab_size=100), "tokenizer.model: 360 pieces, expected at most the 100"),
        (change_config(pad_token_id=361), "config.json: pad_token_id is 361, expected one of"),
        (change_config(pad_token_id="0"), "config.json: pad_token_id is '0', expected an integer"),
        (change_config(num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight is missing"),
        (change_config(intermediate_size=50), "mlp.gate_proj.weight is (88, 32), expected (50, 32"),
        (write("model.safetensors", None), "model: no model.safetensors"),
        (only_bin, "save_pretrained to a new folder, and copy tokenizer.model there"),
        (write("model.safetensors", b""), "model.safetensors: not a whole safetensors file"),
        (write("model.safetensors", b"version https://git-lfs"), "safetensors: not a whole"),
        (write("model.safetensors", b"\xff" * 99), "model.safetensors: not a whole safetensors"),
        (cut_short("model.safetensors", 50_000), "model.safetensors: not a whole safetensors file"),
        (cut_short("model.safetensors", 100), "model.safetensors: not a whole safetensors file"),
        (
            change_tensors(lambda t: t.pop(NORM)),
            "model: tensors do not fit its config.json: model.norm.weight is missing",
        ),
        (
            change_tensors(lambda t: t.update(extra=torch.ones(2))),
            "tensors do not fit its config.json: extra is unexpected",
        ),
        (
            change_tensors(lambda t: t.update({NORM: torch.ones(31)})),
            "model.norm.weight is (31,), expected (32,)",
        ),
        (
            change_tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
            "model.norm.weight is I8, expected one of F32, F16, BF16",
        ),
        (shards({"a": "model-00002-of-00002.safetensors"}), "model-00002-of-00002.safetensors: no"),
        (shards({"a": 5}), "model.safetensors.index.json: not an index of safetensors"),
        (shards([1]), "model.safetensors.index.json: not an index of safetensors"),
        (shards({}), "model.norm.weight is missing"),
        (
            lambda folder: [
                write("model.safetensors", None)(folder),
                write("model.safetensors.index.json", b"[" * 100_000)(folder),
            ],
            "model.safetensors.index.json: not an index of safetensors",
        ),
        (
            change_config(tie_word_embeddings=True),
            "model.safetensors: lm_head.weight differs from the embedding, but config.json says",
        ),
        (write("tokenizer.model", None), "tokenizer.model: no such file, expected Llama's"),
        (write("tokenizer.model", b""), "tokenizer.model: "),
        (write("tokenizer.model", b"\xff\xfe nonsense"), "tokenizer.model: not a SentencePiece"),
        (write("tokenizer.model", b"version https://git-lfs.github.com"), "not a SentencePiece"),
        (write("tokenizer.model", b"IQ== 0\nIg== 1\n"), "tokenizer.model: not a SentencePiece"),
        (write("tokenizer_config.json", b"{"), "tokenizer_config.json: not JSON"),
        (write("tokenizer_config.json", b"[1]"), "tokenizer_config.json: found a JSON list"),
        (write("tokenizer.json", b"{"), "tokenizer.json: not JSON"),
        (write("tokenizer.json", b'{"model": {"vocab": []}}'), "tokenizer.json: not a BPE"),
        (write("tokenizer.json", b'{"model": {"merges": [5]}}'), "tokenizer.json: not a BPE"),
    ],
)
def test_bad_model_folder(refused, model, breakage, expected):
    """A folder that is not a whole Llama of the kind implemented is refused by file and field."""
    breakage(model)
    assert expected in refused(model=str(model))


def test_missing_model_folder(refused, model):
    """A folder that is not there (a hub's name, say), or a file, is refused."""
    assert "no such folder, expected a Hugging Face" in refused(model="meta-llama/Llama-2-7b-hf")
    assert "no such folder" in refused(model=str(model / "config.json"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(base, conversations, model, tmp_path, value):
    """One NaN or infinity stops the run before anything but the empty folder is there."""
    change_tensors(lambda t: t[NORM][5:6].fill_(float(value)))(model)
    out = tmp_path / "out"
    flags = {"model": str(model), "data": [str(conversations)], "out": str(out)}
    with pytest.raises(InputError, match=f"model.safetensors: {NORM} holds values that are not"):
        sft.main(flags)
    assert list(out.iterdir()) == []
