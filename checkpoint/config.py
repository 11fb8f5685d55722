"""config.json of a Hugging Face Llama folder: read, checked, and refused where it means more.

The model implements LLaMA 2. A config that asks for anything else is refused by name: computed as
LLaMA 2 it would get silently wrong.
"""

import math
from pathlib import Path

import torch

from checkpoint.quantized import check_quantization
from model import LlamaConfig
from program.errors import InputError
from program.files import read_object


def read_config(folder: str | Path, quantized: bool = False) -> LlamaConfig:
    """The `LlamaConfig` of a Hugging Face folder.

    quantized: weights in bitsandbytes' NF4 are taken, too. Raises `InputError` for a field that is
    wrong, or that asks for what is not implemented.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder, expected a Hugging Face Llama checkpoint")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a Hugging Face Llama checkpoint")
    values = read_object(path)
    if quantized:
        check_quantization(values, path)
    config = config_from_dict(values, path)
    if torch.cuda.is_available() and (config.head_dim % 16 or config.head_dim > 128):
        raise InputError(
            f"{path}: head_dim is {config.head_dim}, expected a multiple of 16 up to 128, which is "
            "what the attention kernel takes on a GPU"
        )
    return config


def config_from_dict(values: dict, path: str | Path = "config.json") -> LlamaConfig:
    """Check the fields of a config.json; `path` is named in errors.

    What transformers 5 refuses is refused, too, since the saved model carries these fields.
    """
    values = {name: v for name, v in values.items() if v is not None or name not in MAY_BE_NULL}
    refuse_what_is_not_implemented(values, path)

    def number(name, kind=int, default=None, most=1 << 20):
        value = values.get(name, default)
        if type(value) is not kind or not 0 < value < math.inf:
            expected = "positive integer" if kind is int else "positive number"
            raise InputError(f"{path}: {name} is {value!r:.60}, expected a {expected}")
        if kind is int and value > most:
            raise InputError(f"{path}: {name} is {str(value):.40}, expected at most {most:,}")
        return value

    heads = number("num_attention_heads")
    hidden_size = number("hidden_size")
    if hidden_size % heads:
        raise InputError(
            f"{path}: hidden_size {hidden_size} is no multiple of num_attention_heads {heads}"
        )
    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers", most=1 << 10),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden_size // heads),
        rms_norm_eps=number("rms_norm_eps", float, 1e-6),
        rope_theta=rope_theta(values, path),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        max_position_embeddings=number("max_position_embeddings", default=2048, most=1 << 40),
    )
    if heads % config.num_key_value_heads:
        raise InputError(
            f"{path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"{path}: head_dim is {config.head_dim}, rotary embedding needs pairs")
    return config


def rope_theta(values: dict, path: str | Path) -> float:
    """The base of the rotary angles, read from where transformers 5 reads it.

    That is rope_scaling (which older versions wrote), else rope_parameters; and where neither has
    it, the top level. Llama 2 checkpoints have none and mean 10,000 (Code Llama: 1e6).
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    for field in {name, "rope_parameters"}:
        if not isinstance(values.get(field, {}), dict):
            found = values[field]
            raise InputError(f"{path}: {field} is {found!r:.60}, expected an object or null")
    rope = values.get(name, {})
    for field in sorted(rope, key=lambda field: field not in ("rope_type", "type")):
        implemented = {"rope_type": ["default"], "type": ["default"], "factor": [1, None],
                       "partial_rotary_factor": [1, None]}.get(field, [None])  # fmt: skip
        if field != "rope_theta" and rope[field] not in implemented:
            raise InputError(
                f"{path}: {name}.{field} is {rope[field]!r:.60}, only {implemented[0]!r} is "
                "implemented"
            )
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float) or not 0 < theta < 1 << 63:  # an int64 in torch
        raise InputError(f"{path}: rope_theta is {theta!r:.60}, expected a positive number")
    return float(theta)


# Where null is the default: for transformers 5, too, but for rope_theta (see `write_configs`).
MAY_BE_NULL = {
    "rope_theta",
    "num_key_value_heads",
    "head_dim",
    "attention_dropout",
    "quantization_config",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_parameters",
    "pretraining_tp",
}


def refuse_what_is_not_implemented(values: dict, path: str | Path) -> None:
    """Raise `InputError` for a config with which this model would silently get wrong results."""
    for name, default, implemented in (
        ("model_type", None, ("llama",)),
        ("hidden_act", "silu", ("silu",)),
        ("attention_bias", False, (False,)),
        ("mlp_bias", False, (False,)),
        ("tie_word_embeddings", False, (False, True)),
        ("attention_dropout", 0.0, (0, 0.0)),
        ("partial_rotary_factor", 1.0, (1, 1.0)),
        ("quantization_config", None, (None,)),
    ):
        found = values.get(name, default)
        # By type, too: 0 and false are equal, but transformers refuses the one for the other.
        if (type(found), found) not in [(type(value), value) for value in implemented]:
            known = " or ".join(repr(value) for value in implemented if value is not None)
            raise InputError(
                f"{path}: {name} is {found!r:.60}, only {known or None} is implemented"
            )
    # Of no use to us, but carried over into the saved config, which transformers 5 checks.
    for name, kinds, expected in (
        ("use_cache", (bool,), "false or true"),
        ("initializer_range", (float,), "a number from 0 to 1"),
        ("pretraining_tp", (int,), "an integer"),
    ):
        found = values.get(name)
        wrong = name in values and type(found) not in kinds
        if wrong or (name == "initializer_range" and found is not None and not 0 <= found <= 1):
            raise InputError(f"{path}: {name} is {found!r:.60}, expected {expected}")
