"""How much a run needs of the disk, and what is said where the disk is full.

A checkpoint holds an fp32 weight and its two moments, the saved model a bf16 weight.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from program.errors import InputError, one_line


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of one resumable checkpoint of `model`: of what is trained."""
    return 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def model_bytes(model: nn.Module) -> int:
    """Bytes of `model` as `save_hf` writes it, with its adapters beside it, if it has any."""
    size = adapter_bytes(model)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:  # they are added to the weights
            size += 2 * parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)  # NF4: 2
    return size


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the model's adapters as `save_adapter` writes them, in fp32; 0 if it has none."""
    return 4 * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


def check_space(
    folder: str | Path, model: nn.Module, checkpoints: int, exports: int = 0,
    adapters_alone: bool = False,
) -> None:  # fmt: skip
    """Raise `InputError` unless the disk takes the model, `checkpoints` and `exports` at once.

    exports: how many models of --export-every lie there at once. adapters_alone: each of them holds
    nothing but adapters. What an interrupted run's folder holds already counts as free: the new
    ones take its place.
    """
    export = adapter_bytes(model) if adapters_alone else model_bytes(model)
    needed = model_bytes(model) + exports * export + checkpoints * checkpoint_bytes(model)
    free = free_bytes(folder)
    own = [Path(folder) / name for name in ("checkpoints", "hf.partial", "export.partial")]
    held = sum(map(folder_bytes, [*own, *Path(folder).glob("step-[0-9]*")]))
    if free + held < needed:
        there = f" and {gigabytes(held)} in its checkpoints" if held else ""
        several = f"{checkpoints} resumable checkpoints; a smaller --keep needs less"
        models = f" and {exports} on the way (--keep-exports keeps fewer)" if exports else ""
        raise InputError(
            f"--out {folder}: {gigabytes(free)} free{there}, expected {gigabytes(needed)} for the "
            f"model{models} and {several if checkpoints > 1 else 'one resumable checkpoint'}"
        )


def free_bytes(folder: str | Path) -> int:
    """Bytes free on the disk of `folder`, which need not be there yet."""
    parent = Path(folder)
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files in `folder`, 0 where there is no such folder.

    A run that is still writing there may take some away meanwhile.
    """
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.{1 if size >= 1e10 else 3}f} GB"


def explained(
    error: BaseException, folder: str | Path, needed: int = 0, advice: str = ""
) -> OSError:
    """The plain reason of an error of the disk or of torch.distributed.checkpoint, as an `OSError`.

    The latter gathers its ranks' exceptions and shows their tracebacks; of a refused write its
    writer often leaves nothing but `unexpected pos 704 vs 598`, and then the free space decides. A
    full disk is told with what was `needed` (bytes), what is free, and the `advice`.
    """
    causes = [error]
    for cause in causes:  # grows while it is read
        inner = [exception for exception, _ in getattr(cause, "failures", {}).values()]
        inner += [cause.__cause__, cause.__context__]
        causes += [exception for exception in inner if exception and exception not in causes]
    refusal = next((cause for cause in causes if isinstance(cause, OSError)), None)
    free = free_bytes(folder)
    full = refusal.errno in (errno.ENOSPC, errno.EDQUOT) if refusal else free < needed
    if full:
        there = f"{gigabytes(needed)} needed, {gigabytes(free)} free"
        return OSError(f"no space left in {folder}: {there}{advice}")
    return refusal or OSError(one_line(causes[-1]))
