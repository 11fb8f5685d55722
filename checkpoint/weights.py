"""Hugging Face folders in and out, without ever holding a whole model in one process.

    load_hf   HF folder ──each rank reads its own rows──► FSDP2 shards
    save_hf   FSDP2 shards ──one tensor at a time──► bf16 HF folder for transformers and vLLM

A folder is written aside and renamed file by file, config.json last: where config.json is, the
folder is complete.

The shapes in a folder are those of a plain `Llama`. A module whose weight is not kept as the folder
has it (adapters/lora.py) takes its rows by `load_rows` and gives them by `merged_rows`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from checkpoint.adapter_folder import adapter_tensors, write_adapter
from checkpoint.config import read_config
from checkpoint.disk import explained, model_bytes
from checkpoint.quantized import BESIDE, check_nf4, is_quantized, read_nf4
from checkpoint.resume import saved_runs
from model import Llama, LlamaConfig
from program.errors import InputError
from program.files import digest, fsync
from program.ranks import gather_lists, own_share, raise_together
from tokens.for_transformers import pad_token, save_tokenizer
from tokens.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000  # of one safetensors file, as transformers 4 cut them
FLOATS = ("F32", "F16", "BF16")
SHARDS = -1  # the dimension of the mesh over which rows are given out; replicas are one before


def find_tensors(model: Llama, folder: str | Path, quantized: bool = False) -> dict[str, Path]:
    """`{tensor name: file}` of an HF folder, after a check of all names, shapes and dtypes.

    Only headers are read. Raises `InputError` with the missing, unexpected and misshapen tensors.
    quantized: projections may be in NF4 (quantized.py checks those as it reads them).
    """
    expected = plain_shapes(model.config)
    files, problems, in_nf4 = {}, [], {}
    for path in weight_files(Path(folder)):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    files[name] = path
                    if quantized and dtype == "U8" and name in expected and "_proj." in name:
                        in_nf4 |= {name + suffix: name for suffix in ("", *BESIDE)}
                        continue
                    if name in expected and shape != expected[name]:
                        problems.append(f"{name} is {shape}, expected {expected[name]}")
                    if name in expected and dtype not in FLOATS:
                        problems.append(f"{name} is {dtype}, expected one of {', '.join(FLOATS)}")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    for name in {*in_nf4.values()}:
        check_nf4(files, name, expected[name])
    problems += [f"{name} is missing" for name in expected if name not in files]
    # Old checkpoints hold the rotary frequencies, and those with tied embeddings the head again.
    unused = ("rotary_emb.inv_freq",)
    tied_head = "lm_head.weight" in files and "lm_head.weight" not in expected
    problems += [
        f"{name} is unexpected"
        for name in files
        if not (name in expected or name.endswith(unused) or name == "lm_head.weight" and tied_head)
        and name not in in_nf4
    ]
    if problems:
        more = f" … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(
            f"{folder}: tensors do not fit its config.json: {'; '.join(problems[:20])}{more}"
        )
    if tied_head and not same_tensors(files, "lm_head.weight", "model.embed_tokens.weight"):
        raise InputError(
            f"{files['lm_head.weight']}: lm_head.weight differs from the embedding, but config.json"
            " says tie_word_embeddings true, expected false (so transformers 5 reads it) or no "
            "lm_head.weight"
        )
    return {name: path for name, path in files.items() if name in expected or name in in_nf4}


def plain_shapes(config: LlamaConfig) -> dict[str, tuple]:
    """`{name: shape}` of the tensors of an HF folder, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}


def same_tensors(files: dict[str, Path], *names: str) -> bool:
    """Whether two tensors hold the same values; a few rows of each are in memory."""
    with safe_open(files[names[0]], "pt") as one, safe_open(files[names[1]], "pt") as other:
        first, second = one.get_slice(names[0]), other.get_slice(names[1])
        if first.get_shape() != second.get_shape() or first.get_dtype() not in FLOATS:
            return False
        return all(
            torch.equal(first[k : k + 4096].float(), second[k : k + 4096].float())
            for k in range(0, first.get_shape()[0], 4096)
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an HF folder: one, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        converted = (
            ", only pytorch_model*.bin: load the model with transformers, write it with "
            "save_pretrained to a new folder, and copy tokenizer.model there"
        )
        has_bin = any(folder.glob("pytorch_model*.bin"))
        raise InputError(f"{folder}: no model.safetensors{converted if has_bin else ''}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of safetensors ({error!r})") from None
    for path in paths:
        if not os.path.isfile(path):  # false, too, for names that no file can have
            raise InputError(f"{path}: no such file, but {index.name} names it")
    return paths


def weights_key(folder: str | Path) -> str:
    """Hash of the weight files of an HF folder. Every rank calls it and reads its share."""
    digests = {path.name: digest(path) for path in own_share(weight_files(Path(folder)))}
    facts = json.dumps(sorted(gather_lists(list(digests.items()))))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def load_hf(model: Llama, folder: str | Path) -> None:
    """Fill `model`, sharded or not, with the weights of an HF folder.

    Each rank reads its own rows of each tensor and nothing else. The file is opened again for each
    tensor, so that only that tensor's pages are in memory. Raises `InputError` on every rank if a
    weight is not finite.
    """
    quantized = any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    files, problems = find_tensors(model, folder, quantized), []
    for name, shape in plain_shapes(model.config).items():
        module, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        local, first = local_rows(parameter.detach())
        if is_quantized(files, name):
            module.load_rows(read_nf4(files, name, shape), first)
            continue
        with safe_open(files[name], "pt") as file:
            rows = file.get_slice(name)[first : first + len(local)].to(local.device)
            # The extremes of rows with a NaN are NaN. (`isfinite` is 20 times slower here.)
            if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
                problems.append(f"{files[name]}: {name} holds values that are not finite")
            module.load_rows(rows, first) if hasattr(module, "load_rows") else local.copy_(rows)
    # If one rank's rows are bad, all ranks stop before rank 0 writes anything. A whole model may be
    # loaded by one rank alone, as the demo's comparison does.
    shared = any(isinstance(p, DTensor) for p in model.parameters())
    for problem in gather_lists(problems) if shared else problems:
        raise InputError(problem)


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor and the index of the first: FSDP2 gives out equal chunks."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size(SHARDS))
    return tensor.to_local(), min(chunk * mesh.get_local_rank(SHARDS), tensor.shape[0])


def save_hf(model: Llama, tokenizer: Tokenizer, source: str | Path, folder: str | Path,
            longest: int = 0, facts: dict | None = None) -> None:  # fmt: skip
    """Write the model as an HF folder in bf16. Every rank calls it; rank 0 writes.

    source: the HF folder that training started from, whose config.json is carried over. longest:
    the tokens of the longest sequence trained, which the saved model then takes. facts: the run's
    (see `open_run`); "weights", the hash of the source's weights, is noted in the adapters' folder,
    and made here if it is missing. The ranks broadcast their rows in turn, one tensor after the
    other, so memory holds one block of rows. A model with adapters is saved merged, and its
    adapters in `folder/adapter`. Raises `RunError` on all ranks if the disk refuses.
    """
    shapes = plain_shapes(model.config)
    blocks = (block for name, shape in shapes.items() for block in blocks_bf16(model, name, shape))
    adapter, failure = adapter_tensors(model), None
    key = ((facts or {}).get("weights") or weights_key(source)) if adapter else None
    if dist.get_rank() == 0:
        partial = Path(folder) / "hf.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if adapter:
                write_adapter(adapter, model, source, key, partial / "adapter")
            write_folder(shapes, blocks, tokenizer, Path(source), partial, Path(folder), longest)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            advice = "; a smaller --keep needs less" if len(saved_runs(folder)) > 1 else ""
            failure = explained(error, folder, model_bytes(model), advice)
    for _ in blocks:  # the other ranks take part in the broadcasts, and so does a failed rank 0
        pass
    raise_together(failure, f"{folder}: the model could not be saved")


def save_adapter(model: Llama, source: str | Path, folder: Path, facts: dict) -> None:
    """Write the model's adapters alone, as PEFT's folder `folder`. Every rank calls it.

    source, facts: as in `save_hf`. Raises `RunError` on all ranks if the disk refuses.
    """
    adapter, failure = adapter_tensors(model), None
    if dist.get_rank() == 0:
        try:
            write_adapter(adapter, model, source, facts["weights"], folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            failure = error
    raise_together(failure, f"{folder}: the adapter could not be saved")


def write_folder(shapes: dict[str, tuple], blocks: Iterator[torch.Tensor], tokenizer: Tokenizer,
                 source: Path, partial: Path, folder: Path, longest: int = 0) -> None:  # fmt: skip
    """Write an HF folder in `partial`, of bf16 blocks as `write_tensors` takes them, and move all
    that is in `partial` to `folder`."""
    write_tensors(shapes, blocks, partial)
    save_tokenizer(tokenizer, source, partial, longest)
    write_configs(tokenizer, source, partial, longest)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():  # adapters, where an earlier try may have put them already
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    partial.rmdir()
    fsync(folder)


def write_tensors(shapes: dict[str, tuple], blocks: Iterator[torch.Tensor], folder: Path) -> None:
    """Stream bf16 blocks of rows, in the order of `shapes`, into safetensors files and an index.

    The safetensors library needs all tensors of a file at once. The format is simple: the length
    of a JSON header, the header with each tensor's offsets, and the bytes.
    """
    shards, room = [], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if not shards or size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = size
        room -= size
    weight_map = {}
    for number, sizes in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file_name = file_name if len(shards) > 1 else "model.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, size in sizes.items():
            offsets = [offset, offset + size]
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": offsets}
            offset += size
            weight_map[name] = file_name
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # the tensors begin at a multiple of 8 bytes
        with open(folder / file_name, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            while offset:
                offset -= file.write(next(blocks).cpu().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sum(s.values()) for s in shards)}}
        index["weight_map"] = weight_map
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def blocks_bf16(model: Llama, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The rows of a weight in bf16, rank after rank; every rank gets all of them."""
    module, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    local, first = local_rows(parameter.detach())
    if hasattr(module, "merged_rows"):
        local = module.merged_rows(first)
    if not isinstance(parameter, DTensor):
        yield local.to(torch.bfloat16)
        return
    # `full_tensor` would hold the tensor twice on gloo, and free it one or two tensors later. The
    # first replica's ranks come first, and hold all rows.
    chunk = -(-len(parameter) // parameter.device_mesh.size(SHARDS))
    for rank, begin in enumerate(range(0, len(parameter), chunk)):
        if rank == dist.get_rank():
            block = local.to(torch.bfloat16)
        else:
            rows = min(chunk, len(parameter) - begin)
            block = local.new_empty(rows, *shape[1:], dtype=torch.bfloat16)
        dist.broadcast(block, rank)
        yield block


def write_configs(tokenizer: Tokenizer, source: Path, folder: Path, longest: int = 0) -> None:
    """config.json (the base's, in bf16) and generation_config.json (stop at EOS).

    longest: max_position_embeddings is at least so many tokens.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    special["pad_token_id"] = tokenizer.sp.piece_to_id(pad_token(tokenizer, source))
    config |= special | {"architectures": ["LlamaForCausalLM"], "use_cache": True}
    if longest > read_config(source, quantized=True).max_position_embeddings:
        config["max_position_embeddings"] = int(longest)
    for name in ("_name_or_path", "dtype", "auto_map", "quantization_config"):
        config.pop(name, None)
    config["torch_dtype"] = "bfloat16"
    if config.get("rope_theta", 0) is None:  # means 10,000, but transformers 5 cannot compute it
        config.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2))
