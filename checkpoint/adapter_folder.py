"""An adapter's folder in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads what is written here, and `adapters/merge.py` merges what either of the two wrote.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from program.errors import InputError, amount
from program.files import read_object

PREFIX = "base_model.model."  # PEFT's, before the names of transformers' modules
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_weights"  # in the metadata of the tensors: the hash of the base's weights (ours alone)
QUANTIZE = "base_quantize"  # nf4 where the adapter was trained on a base in NF4 (ours alone)

# Fields of adapter_config.json that change what an adapter computes; what is implemented of each.
IMPLEMENTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    # The others start from a base with something taken off its weights, and belong to that base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`{PEFT's name: tensor}` of the adapters in a model, fp32, on CPU; empty where there are none.

    Every rank calls it, and gets all of them.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            whole = parameter.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            tensors[PREFIX + name] = whole.float().cpu()
    return tensors


def write_adapter(
    tensors: dict[str, Tensor], model: nn.Module, source: str | Path, key: str, folder: Path
) -> None:
    """Write `adapter_tensors` of a model as PEFT's folder `folder`.

    source: the folder of the base; key: the hash of its weights, of which `merge` asks the same.
    """
    adapted = next(module for module in model.modules() if hasattr(module, "lora_A"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": adapted.rank,
        "lora_alpha": adapted.alpha,
        "lora_dropout": adapted.dropout.share,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    metadata = {"format": "pt", KEY: key} | ({QUANTIZE: "nf4"} if adapted.quantized else {})
    folder.mkdir()
    # Not by save_file, whose error of a full disk is no `OSError`.
    (folder / TENSORS).write_bytes(save(tensors, metadata))
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_adapter(
    folder: str | Path, shapes: dict[str, tuple]
) -> tuple[float, dict[str, tuple], dict]:
    """Scale, `{name of a weight: (A, B)}` and metadata of an adapter's folder, ours or PEFT's.

    shapes: `{name: shape}` of the base's weights. A (R, K) and B (N, R) are fp32. Raises
    `InputError` for an adapter of another base, and for what is not implemented.
    """
    path, folder = Path(folder) / CONFIG, Path(folder)
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an adapter's folder in PEFT's format")
    config = read_object(path)
    for name, values in IMPLEMENTED.items():
        if config.get(name, values[0]) not in values:
            raise InputError(
                f"{path}: {name} is {config[name]!r:.60}, only {values[0]!r} is implemented"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise InputError(
            f"{path}: r is {rank!r:.20} and lora_alpha {alpha!r:.20}, expected numbers"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / TENSORS}: not a whole safetensors file ({error})") from None
    pairs = {}
    for name in sorted(tensors):
        stem, _, half = name.removeprefix(PREFIX).partition(".lora_")
        if half == "A.weight":
            weight = f"{stem}.weight"
            A, B = tensors[name], tensors.get(f"{PREFIX}{stem}.lora_B.weight")
            check_pair(folder / TENSORS, weight, A, B, rank, shapes)
            pairs[weight] = A, B
        elif half != "B.weight":
            raise InputError(f"{folder / TENSORS}: {name} is unexpected, expected A and B of LoRA")
    if 2 * len(pairs) != len(tensors) or not pairs:
        raise InputError(
            f"{folder / TENSORS}: {amount(len(tensors), 'tensors')}, expected a B for each of "
            f"{len(pairs)} A"
        )
    return scale, pairs, metadata


def check_pair(
    path: Path, weight: str, A: Tensor, B: Tensor | None, rank: int, shapes: dict[str, tuple]
) -> None:
    """Raise `InputError` unless A and B are an adapter of one of the base's weights."""
    found = tuple(A.shape), None if B is None else tuple(B.shape)
    if weight not in shapes or len(shapes[weight]) != 2:
        raise InputError(f"{path}: has an adapter of {weight}, which the base does not have")
    N, K = shapes[weight]
    if found != ((rank, K), (N, rank)):
        raise InputError(
            f"{path}: A and B of {weight} are {found[0]} and {found[1]}, expected {(rank, K)} and "
            f"{(N, rank)}: an adapter of another base"
        )
    if not all(half.isfinite().all() for half in (A, B)):
        raise InputError(f"{path}: A or B of {weight} holds values that are not finite")
