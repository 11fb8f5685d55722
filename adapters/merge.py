"""An adapter and its base become one model: a Hugging Face folder, as sft.py would have saved it.

    python -m adapters.merge --model BASE --adapter DIR --out DIR

The adapter is the `adapter/` of a run of ours, or PEFT's. One weight at a time is in memory: its
fp32 values plus the adapter's product, rounded to bf16 once. An adapter that was trained on a base
in NF4 is added to the decoded weights, those it was trained on; `--quantize none` adds it to the
weights as they stand in the folder.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from adapters.lora import PROJECTIONS
from checkpoint.adapter_folder import KEY, QUANTIZE, read_adapter
from checkpoint.config import read_config
from checkpoint.disk import explained, model_bytes
from checkpoint.quantized import is_quantized, read_nf4
from checkpoint.weights import find_tensors, plain_shapes, weights_key, write_folder
from kernels import nf4
from model import Llama
from program.errors import InputError, RunError, reported
from program.flags import parse_args
from program.ranks import leave, start
from tokens.for_transformers import check_tokenizer
from tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class MergeConfig:
    """Flags of `python -m adapters.merge`."""

    model: str | None = None  # Hugging Face folder of the base
    adapter: str | None = None  # folder with adapter_config.json and adapter_model.safetensors
    out: str | None = None  # new folder, for the merged model
    quantize: str | None = None  # the base's weights, nf4 or none (default: as it was trained on)


def merge(config: MergeConfig) -> None:
    """Write the merged model. Raises `InputError` before anything is written."""
    for name in ("model", "adapter", "out"):
        if getattr(config, name) is None:
            raise InputError(f"--{name} is missing, expected a folder")
    if config.quantize not in (None, "nf4", "none"):
        raise InputError(f"--quantize is {config.quantize}, expected nf4 or none")
    source, out = Path(config.model), Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is there already, expected a new folder")
    model_config = read_config(source, quantized=True)
    tokenizer = Tokenizer(source)
    tokenizer.check_fits(model_config.vocab_size)
    check_tokenizer(tokenizer, source)
    with torch.device("meta"):
        model = Llama(model_config)
    files, shapes = find_tensors(model, source, quantized=True), plain_shapes(model_config)
    scale, pairs, metadata = read_adapter(config.adapter, shapes)
    check_base(source, config.adapter, metadata)
    quantize = (config.quantize or metadata.get(QUANTIZE)) == "nf4"
    weights = merged_weights(files, shapes, scale, pairs, quantize)
    partial = out / "hf.partial"
    try:
        partial.mkdir(parents=True)
        write_folder(shapes, weights, tokenizer, source, partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = explained(error, out, model_bytes(model))
        raise RunError(f"{out}: the model could not be saved ({reason})") from None
    decoded = ", decoded from NF4" if quantize else ""
    print(f"{out}: {source}{decoded}, with {len(pairs)} adapted weights of {config.adapter}")


def check_base(source: Path, adapter: str | Path, metadata: dict) -> None:
    """Raise `InputError` where an adapter of ours names another base than `source`."""
    key = weights_key(source)
    if metadata.get(KEY, key) != key:
        raise InputError(
            f"--adapter {adapter}: trained on weights with hash {metadata[KEY]}, but those of "
            f"{source} have {key}: an adapter of another base"
        )


@torch.no_grad()
def merged_weights(
    files: dict[str, Path], shapes: dict[str, tuple], scale: float, pairs: dict[str, tuple],
    quantize: bool,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Each weight in bf16, in the order of `shapes`. Raises `InputError` if one is not finite.

    files: of `find_tensors`; scale, pairs: of `read_adapter`; quantize: projections are those that
    NF4 makes of them.
    """
    for name, shape in shapes.items():
        if is_quantized(files, name):
            weight = nf4.dequantize(read_nf4(files, name, shape), torch.float32)
        else:
            with safe_open(files[name], "pt") as file:
                weight = file.get_tensor(name).float()
            if not weight.isfinite().all():
                raise InputError(f"{files[name]}: {name} holds values that are not finite")
            if quantize and name.split(".")[-2] in PROJECTIONS:
                weight = nf4.dequantize(nf4.quantize(weight), torch.float32)
        if name in pairs:
            A, B = pairs[name]
            weight = weight.addmm(B, A, alpha=scale)
        yield weight.bfloat16()


if __name__ == "__main__":
    with reported():
        flags = parse_args(MergeConfig)
        start()
        merge(MergeConfig(**flags))
        leave()
