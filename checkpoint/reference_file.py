"""The reference's log-probabilities on disk, so that a second run of DPO need not compute them.

They stand beside the data or, where that folder cannot be written, in the output folder, under a
hash of all that decides them.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch

from model import Llama
from program.errors import RunError, one_line
from program.files import written_aside
from tokens.documents import Documents


def reference_files(model: Llama, documents: Documents, config, weights: str) -> list[Path]:
    """Where the reference may be kept, under a hash of all that decides it."""
    shape = dataclasses.asdict(model.config)
    # Rounding depends on the layout of a row, so it is a fact, too.
    layout = "each prompt once"
    facts = [weights, config.quantize, shape, documents.key, config.max_seq_len, config.dtype]
    key = hashlib.sha256(json.dumps([*facts, layout]).encode()).hexdigest()[:16]
    name = f"{documents.paths[0].name}.reference-{key}"
    return [documents.paths[0].parent / name, Path(config.out) / name]


def read_reference(paths: list[Path], unknown: torch.Tensor) -> torch.Tensor:
    """The reference kept in the first of `paths` that is there; `unknown` where none is whole."""
    for path in paths:
        with contextlib.suppress(OSError):  # most often: no such file
            content = path.read_bytes()
            if content[:32] == hashlib.sha256(content[32:]).digest():
                return torch.frombuffer(bytearray(content[32:]), dtype=torch.float64).view(-1, 2)
            print(f"warning: {path} is damaged and is made anew", file=sys.stderr)
    return unknown


def write_reference(paths: list[Path], logps: torch.Tensor) -> None:
    """Write a SHA-256 and the numbers to the first of `paths` that takes them."""
    content = logps.numpy().tobytes()
    for path in paths:
        try:
            with written_aside(path, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            return
        except OSError as error:
            refusal = error
    raise RunError(f"the reference's log-probabilities could not be kept ({one_line(refusal)})")
