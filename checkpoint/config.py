"""config.json of a Hugging Face Llama folder: read, checked, and refused where it means more.

The model implements LLaMA 2. A config that asks for anything else is refused by name: computed as
LLaMA 2 it would get silently wrong.
"""

import math
from pathlib import Path

from model import LlamaConfig
from program.errors import InputError
from program.files import read_object


def read_config(folder):
    """The `LlamaConfig` of a Hugging Face folder.

    Raises `InputError` for a field that is wrong, or that asks for what is not implemented.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder, expected a Hugging Face Llama checkpoint")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a Hugging Face Llama checkpoint")
    return config_from_dict(read_object(path), path)


def config_from_dict(values, path="config.json"):
    """Check the fields of a config.json; `path` is named in errors."""
    refuse_what_is_not_implemented(values, path)

    def number(name, kind=int, default=None):
        value = values.get(name)
        value = default if value is None else value
        allowed = int if kind is int else (int, float)
        if not isinstance(value, allowed) or value is True or not 0 < value < math.inf:
            expected = "positive integer" if kind is int else "positive number"
            raise InputError(f"{path}: {name} is {value!r}, expected a {expected}")
        return kind(value)

    heads = number("num_attention_heads")
    hidden_size = number("hidden_size")
    # transformers 5 keeps the base of the rotary angles in rope_parameters, older ones beside
    # the other fields; Llama 2 checkpoints have neither and mean 10,000 (Code Llama: 1e6).
    rope = values.get("rope_parameters") or {}
    values = values | {"rope_theta": rope.get("rope_theta", values.get("rope_theta"))}
    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden_size // heads),
        rms_norm_eps=number("rms_norm_eps", float, 1e-6),
        rope_theta=number("rope_theta", float, 10_000.0),
        tie_word_embeddings=bool(values.get("tie_word_embeddings")),
        max_position_embeddings=number("max_position_embeddings", default=2048),
    )
    if hidden_size % heads:
        raise InputError(
            f"{path}: hidden_size {hidden_size} is no multiple of num_attention_heads {heads}"
        )
    if heads % config.num_key_value_heads:
        raise InputError(
            f"{path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"{path}: head_dim is {config.head_dim}, rotary embedding needs pairs")
    return config


def refuse_what_is_not_implemented(values, path):
    """Raise `InputError` for a config with which this model would silently get wrong results."""
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    for name, found in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(found, dict):
            raise InputError(f"{path}: {name} is {found!r}, expected an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling_kind = scaling.get("rope_type", scaling.get("type", "default" if not scaling else "?"))
    for name, found, implemented in (
        ("model_type", values.get("model_type"), ("llama",)),
        ("hidden_act", values.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", values.get("attention_bias", False), (False, None)),
        ("mlp_bias", values.get("mlp_bias", False), (False, None)),
        ("tie_word_embeddings", values.get("tie_word_embeddings"), (False, True, None)),
        ("attention_dropout", values.get("attention_dropout", 0.0), (0, None)),
        ("rope_parameters.rope_type", kind, ("default",)),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,)),
        ("rope_scaling", scaling_kind, ("default",)),
        ("quantization_config", values.get("quantization_config"), (None,)),
    ):
        if found not in implemented:
            known = " or ".join(repr(value) for value in implemented if value is not None)
            raise InputError(f"{path}: {name} is {found!r}, only {known or None} is implemented")
