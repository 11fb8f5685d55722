"""Folders that bitsandbytes has quantised: NF4 with double quantisation, read as they are.

Of a quantised `….weight` (N, K) such a folder holds the packed codes under its own name, as a
column of bytes, and beside it `….weight.absmax`, `.quant_map`, `.nested_absmax`,
`.nested_quant_map` and, in `.quant_state.bitsandbytes__nf4`, a JSON text with the rest.
"""

import contextlib
import json

import torch
from safetensors import safe_open

from kernels import nf4
from program.errors import InputError

STATE = ".quant_state.bitsandbytes__nf4"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def check_quantization(values, path):
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


def is_quantized(files, name):
    """Whether a tensor is stored in NF4; files: `{name: file}` of all tensors of the folder."""
    return name + STATE in files


def read_nf4(files, name, shape):
    """The `NF4` of a quantised weight (N, K) = shape. Raises `InputError` for one of another kind.

    files: `{name: file}` of all tensors of the folder.
    """

    def read(suffix):
        with safe_open(files[name + suffix], "pt") as file:
            return file.get_tensor(name + suffix)

    missing = [name + suffix for suffix in BESIDE if name + suffix not in files]
    if missing:
        raise InputError(f"{files[name]}: {name} is quantised, but {missing[0]} is missing")
    codes, state = read(""), {}
    with contextlib.suppress(ValueError):
        state = json.loads(bytes(read(STATE).tolist()))
    expected = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": list(shape)}
    expected |= {"nested_blocksize": nf4.NESTED_BLOCK}
    for field, value in expected.items():
        if state.get(field) != value:
            raise InputError(
                f"{files[name]}: {name}{STATE} has {field} {state.get(field)!r:.60}, "
                f"expected {value}"
            )
    N, K = shape
    blocks = N * K // nf4.BLOCK
    absmax, nested = read(".absmax"), read(".nested_absmax")
    sizes = [tensor.numel() for tensor in (codes, absmax, nested)]
    maps = torch.equal(read(".quant_map"), torch.tensor(nf4.LEVELS)) and torch.equal(
        read(".nested_quant_map"), torch.tensor(nf4.scale_levels())
    )
    if sizes != [N * K // 2, blocks, -(-blocks // nf4.NESTED_BLOCK)] or not maps:
        raise InputError(f"{files[name]}: {name} is not NF4 of a weight of shape {(N, K)}")
    offset = torch.tensor(state["nested_offset"])
    return nf4.NF4(codes.view(torch.uint8).view(N, K // 2), absmax, nested, offset)
