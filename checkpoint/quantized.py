"""Folders that bitsandbytes has quantised: NF4 with double quantisation, read as they are.

Of a quantised `….weight` (N, K) such a folder holds the packed codes under its own name, as a
column of bytes, and beside it `….weight.absmax`, `.quant_map`, `.nested_absmax`,
`.nested_quant_map` and, in `.quant_state.bitsandbytes__nf4`, a JSON text with the rest.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from kernels import nf4
from program.errors import InputError

STATE = ".quant_state.bitsandbytes__nf4"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def check_quantization(values: dict, path: Path) -> None:
    """Take `quantization_config` out of a config.json's fields if it is one that is read here.

    Raises `InputError` for another kind of quantisation.
    """
    found = values.pop("quantization_config", None)
    if found is None:
        return
    expected = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    expected |= {"bnb_4bit_use_double_quant": True}
    for name, value in expected.items():
        if not isinstance(found, dict) or found.get(name) != value:
            raise InputError(
                f"{path}: quantization_config is {found!r:.200}, expected {name} {value}: only "
                "bitsandbytes' NF4 with double quantisation is implemented"
            )


def is_quantized(files: dict[str, Path], name: str) -> bool:
    """Whether a tensor is stored in NF4; files: `{name: file}` of all tensors of the folder."""
    return name + STATE in files


def check_nf4(files: dict[str, Path], name: str, shape: tuple[int, int]) -> None:
    """Raise `InputError` unless a weight (N, K) = shape is stored in NF4 as it is read here.

    files: `{name: file}` of all tensors of the folder. The codes and scales are not read.
    """
    missing = [name + suffix for suffix in BESIDE if name + suffix not in files]
    if missing:
        raise InputError(f"{files[name]}: {name} is quantised, but {missing[0]} is missing")
    state = read_state(files, name)
    expected = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": list(shape)}
    expected |= {"nested_blocksize": nf4.NESTED_BLOCK}
    for field, value in expected.items():
        if state.get(field) != value:
            raise InputError(
                f"{files[name]}: {name}{STATE} has {field} {state.get(field)!r:.60}, "
                f"expected {value}"
            )
    offset = state.get("nested_offset")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise InputError(
            f"{files[name]}: {name}{STATE} has nested_offset {offset!r:.60}, expected a number"
        )
    N, K = shape
    blocks = N * K // nf4.BLOCK
    nested = -(-blocks // nf4.NESTED_BLOCK)
    stored = {"": (N * K // 2, "U8"), ".absmax": (blocks, "U8"), ".nested_absmax": (nested, "F32")}
    for suffix, (size, dtype) in stored.items():
        with safe_open(files[name + suffix], "pt") as file:
            tensor = file.get_slice(name + suffix)
            found, kind = tensor.get_shape(), tensor.get_dtype()
        if math.prod(found) != size or kind != dtype:
            raise InputError(
                f"{files[name]}: {name}{suffix} is {found} of {kind}, expected {size} numbers of "
                f"{dtype}"
            )
    if not read(files, name + ".nested_absmax").isfinite().all():
        raise InputError(f"{files[name]}: {name}.nested_absmax holds values that are not finite")
    for suffix, levels in ((".quant_map", nf4.LEVELS), (".nested_quant_map", nf4.scale_levels())):
        if read(files, name + suffix).tolist() != torch.tensor(levels).tolist():
            raise InputError(f"{files[name]}: {name}{suffix} has other levels than NF4's")


def read_nf4(files: dict[str, Path], name: str, shape: tuple[int, int]) -> nf4.NF4:
    """The `NF4` of a weight (N, K) = shape that `check_nf4` has passed."""
    N, K = shape
    absmax, nested = (
        read(files, name + suffix).flatten() for suffix in (".absmax", ".nested_absmax")
    )
    offset = torch.tensor(read_state(files, name)["nested_offset"], dtype=torch.float32)
    return nf4.NF4(read(files, name).view(N, K // 2), absmax, nested, offset)


def read_state(files: dict[str, Path], name: str) -> dict:
    """The JSON object beside a quantised weight; {} where it is none."""
    try:
        state = json.loads(bytes(read(files, name + STATE).flatten().tolist()))
    except (ValueError, TypeError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def read(files: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(files[name], "pt") as file:
        return file.get_tensor(name)
