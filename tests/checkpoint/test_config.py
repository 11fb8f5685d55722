"""checkpoint/config.py: a config means what transformers 5 computes, or it is refused."""

import copy
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoint.config import config_from_dict, read_config
from checkpoint.weights import find_tensors, write_configs
from model import Llama
from program.errors import InputError
from tokens.tokenizer import Tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
         "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
         "max_position_embeddings")  # fmt: skip
VALUES = st.sampled_from(
    [None, True, False, 0, 1, 2, 4, 7, 8, -1, 1.0, 0.5, 1e-5, 5e5, 10**30, 10**400, float("nan"),
     float("inf"), "x", "", [], {}]
)  # fmt: skip
ROPE = st.sampled_from([None, {}, [], 0, "x"]) | st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "full"]),
    st.sampled_from(["default", "linear", 5e5, 1.0, 0.5, 20, None, {"rope_theta": 3.0}]),
)
CHANGES = st.dictionaries(
    st.sampled_from(
        [*NAMES, "rope_theta", "attention_bias", "mlp_bias", "attention_dropout", "use_cache",
         "partial_rotary_factor", "initializer_range", "pretraining_tp", "hidden_act"]
    ),
    VALUES,
    max_size=3,
)  # fmt: skip


def angles(config):
    """The rotary frequencies that model.py computes."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return 1.0 / config.rope_theta**exponents


def assert_computed_alike(values):
    """Ours and theirs agree in every field that the model uses; `copy`, since theirs fills in."""
    ours, theirs = config_from_dict(values), TheirConfig.from_dict(copy.deepcopy(values))
    assert [getattr(ours, name) for name in NAMES] == [getattr(theirs, name) for name in NAMES]
    # Theirs divides by a power of a Python number, ours too: rounding in fp32 alone may differ.
    torch.testing.assert_close(
        angles(ours), LlamaRotaryEmbedding(theirs).inv_freq, rtol=1e-6, atol=0
    )
    return ours


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(CHANGES, st.fixed_dictionaries({}, optional={"rope_scaling": ROPE, "rope_parameters": ROPE}))
def test_what_is_taken_is_computed_as_transformers_does(changes, rope):
    """Of random configs: refused in one line, or taken by both and computed alike."""
    values = CONFIG | changes | rope
    if values.get("rope_theta", 0) is None:  # read as absent, and so saved (see the next test)
        values.pop("rope_theta")
    try:
        config_from_dict(copy.deepcopy(values))
    except InputError as error:
        assert str(error).startswith("config.json: ") and len(str(error)) < 200
    else:
        assert_computed_alike(values)


@pytest.mark.parametrize(
    "fields, theta",
    [
        ({}, 10_000.0),
        ({"rope_theta": 1_000_000}, 1e6),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}}, 5e5),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 3e5}, 3e5),
        ({"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 7e5}}, 5e5),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 7e5}, "rope_theta": 3e5}, 7e5),
        ({"rope_scaling": {}, "rope_parameters": {"rope_type": "default"}, "rope_theta": 3e5}, 3e5),
        ({"rope_parameters": {"rope_theta": 7e5, "factor": None}}, 7e5),
    ],
    ids=str,
)
def test_where_the_base_of_the_angles_stands(fields, theta):
    """At the top level, in rope_parameters, or in rope_scaling, which comes first."""
    assert assert_computed_alike(CONFIG | fields).rope_theta == theta


def test_a_base_of_null_is_saved_as_absent(base, tmp_path):
    """Read as 10,000; transformers 5 would stop at the null in the saved config."""
    values = CONFIG | {"rope_theta": None}
    assert config_from_dict(values).rope_theta == 10_000.0
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "out").mkdir()
    write_configs(Tokenizer(base), tmp_path, tmp_path / "out")
    assert_computed_alike(json.loads((tmp_path / "out" / "config.json").read_text()))


# ---- Tied embeddings


def tied(base, folder, change):
    """A copy of the tiny model with tied embeddings, its head the changed embedding, or none."""
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone())
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.device("meta"):
        return Llama(config_from_dict(config))


def test_a_head_that_repeats_the_embedding_is_tied(base, tmp_path):
    """Old checkpoints hold both; without a head, and with the same in another type, as well."""
    for k, change in enumerate((lambda t: t, lambda t: None, lambda t: t.double().float())):
        model = tied(base, tmp_path / str(k), change)
        assert "lm_head.weight" not in find_tensors(model, tmp_path / str(k))


@pytest.mark.parametrize("row", [0, 360])
def test_a_head_of_its_own_is_not_tied_in_silence(base, tmp_path, row):
    """One other value, in the first row or the last: transformers 5 uses it, we refuse."""

    def change(head):
        head[row, 5] += 1e-3
        return head

    model = tied(base, tmp_path / "model", change)
    with pytest.raises(InputError, match="lm_head.weight differs from the embedding, but config"):
        find_tensors(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    model = tied(base, tmp_path / "narrow", lambda head: head[:-1])
    with pytest.raises(InputError, match="lm_head.weight differs"):
        find_tensors(model, tmp_path / "narrow")


# ---- Broken files


@pytest.mark.parametrize("head_dim, taken", [(16, True), (128, True), (40, False), (256, False)])
def test_head_sizes_that_the_kernel_takes_not_are_refused_on_a_gpu(
    head_dim, taken, base, tmp_path, monkeypatch
):
    """In one line before anything is loaded; on CPU every even size is right."""
    values = json.loads((base / "config.json").read_text()) | {"head_dim": head_dim}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).head_dim == head_dim
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if taken:
        assert read_config(tmp_path).head_dim == head_dim
    else:
        with pytest.raises(InputError, match=f"head_dim is {head_dim}, expected a multiple of 16"):
            read_config(tmp_path)


def test_broken_headers_and_indices_are_refused(base, tmp_path):
    """Random bytes in a safetensors header, random values in an index: whole, or refused."""
    rng, folder = random.Random(0), tmp_path / "model"
    folder.mkdir()
    values = json.loads((base / "config.json").read_text())
    with torch.device("meta"):
        model = Llama(config_from_dict(values))
    raw = (base / "model.safetensors").read_bytes()
    names = list(load_file(base / "model.safetensors"))
    header = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for k in range(400):
        if k % 2:
            content = bytearray(raw)
            for _ in range(rng.choice([1, 2, 8])):
                content[rng.randrange(header)] = rng.randrange(256)
            (folder / "model.safetensors").write_bytes(content)
        else:
            (folder / "model.safetensors").unlink(missing_ok=True)
            (folder / "a.safetensors").write_bytes(raw)
            places = dict.fromkeys(names, "a.safetensors")
            odd = ["", None, 5, [], {}, "b", "\0", "\ud800", "../model", "a.safetensors", "." * 300]
            places[rng.choice(names)] = rng.choice(odd)
            index = rng.choice([{"weight_map": places}, {"weight_map": rng.choice(odd)}, odd])
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        try:
            assert find_tensors(model, folder).keys() == dict(model.named_parameters()).keys()
        except InputError as error:
            refused += str(folder) in str(error)
    assert refused > 300  # most changes break something, and every error names its file
