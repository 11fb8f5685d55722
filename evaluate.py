"""The paper's benchmarks on a Hugging Face Llama folder: scores, and every prompt and answer.

    python evaluate.py                                                  the demo's model and tasks
    python evaluate.py --model DIR --data DIR --tasks mmlu gsm8k --out results.json
    torchrun --nproc_per_node 8 evaluate.py …               each GPU takes a share of the prompts

DIR of --data holds each benchmark's files under their published names, in a folder named like the
task. Beside results.json lies results.jsonl, a line for each prompt with completion and verdict: to
look at, and what an interrupted evaluation goes on from.

Source: Ivison et al. 2023 (arXiv 2311.10702), appendix A; open-instruct eval/ of November 2023.
"""

import threads  # noqa: F401, before torch

# isort: split
import dataclasses
import hashlib
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import demo
from checkpoint import digest, weight_files
from decoding import TextGenerator
from errors import InputError, reported
from evals.harness import Options, Records
from parallel import gather_lists, start
from run_folder import read_records, write_records
from training import check_bounds, environment, parse_args

TASKS = (
    "mmlu", "gsm8k", "bbh", "tydiqa", "humaneval", "truthfulqa", "toxigen", "alpaca_eval",
    "mt_bench", "demo",
)  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """The flags of evaluate.py; the defaults are the paper's settings."""

    model: str | None = None  # Hugging Face folder (default: the demo's newest model)
    tasks: list[str] | None = None  # benchmarks to run (default: demo)
    data: str | None = None  # folder with a folder of published files for each task
    out: str = "runs/eval/results.json"  # scores; every prompt and answer in .jsonl beside it
    full: bool = False  # all items, where the paper drew a sample
    chat: bool = True  # ask in Tulu's chat format; --no-chat for a base model
    mmlu_shots: int = 0  # examples before an MMLU question (the paper reports 0; 5 is usual)
    slots: int = 16  # sequences decoded at a time
    context: int = 0  # most tokens of prompt and answer (0: the model's limit)
    seed: int = 42  # of samples of items and of tokens
    dtype: str | None = None  # bfloat16 or float32 (default: bfloat16 on a GPU)


def main(flags):
    rank, world, device = start()
    config = EvalConfig(**flags)
