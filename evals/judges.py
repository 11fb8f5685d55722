"""Judges that are Llamas: they read the answers once the model has left the memory.

    the answers' records ──► prompt for the judge ──► its record ──► verdict ──► score of the task

`--truth-judge` and `--info-judge` are fine-tuned for TruthfulQA. `--judge` is any Llama that
follows instructions: it compares answers for AlpacaEval, and grades them for MT-Bench, in the
prompts that GPT-4 gets there. Its score is that judge's alone, and not comparable with GPT-4's.

A benchmark that has judges has two functions more: `judge` asks one of them about every answer, and
`judged` makes a score of what they said. A judgement is a record like any other, under
"task/judge". It belongs to its answer and to its judge's weights: after an interruption only what
has no judgement yet is judged, and an answer that has changed is judged again.

judge_prompts.json has the published texts (Apache 2.0), each with its system message:
alpaca_eval_gpt4/alpaca_eval.txt of alpaca-eval 0.3.1, and the four for single answers in FastChat's
fastchat/llm_judge/data/judge_prompts.jsonl. A judge gets them in Tulu's chat format.
"""

import gc
import json
import re
from pathlib import Path
from types import ModuleType

import torch

from checkpoint.config import read_config
from checkpoint.weights import weight_files, weights_key
from decoding.generator import TextGenerator
from evals.harness import Options, Records
from program.errors import InputError
from tokens.tokenizer import Tokenizer

ROLES = {  # flag: the tasks that it judges
    "truth_judge": ("truthfulqa",),
    "info_judge": ("truthfulqa",),
    "judge": ("alpaca_eval", "mt_bench"),
}
PROMPTS = json.loads(Path(__file__).with_name("judge_prompts.json").read_text(encoding="utf-8"))
NOT_GPT4 = "this judge's verdicts alone, not comparable with GPT-4's, which the paper reports"


def judge_prompt(tokenizer: Tokenizer, name: str, fields: dict[str, str]) -> list[int]:
    """Token ids of a published prompt, its {places} filled from `fields`: a system and a user turn.

    What a field contains is text, even if it looks like another place.
    """
    user = re.sub(r"\{(\w+)\}", lambda place: fields[place[1]], PROMPTS[name]["user"])
    return tokenizer.prompt(
        [{"role": "system", "content": PROMPTS[name]["system"]}, {"role": "user", "content": user}]
    )


def judges_of(config, task: str) -> dict[str, str]:
    """{flag: folder} of the judges that this evaluation has for a task."""
    folders = {role: getattr(config, role) for role, tasks in ROLES.items() if task in tasks}
    return {role: folder for role, folder in folders.items() if folder}


def check_judges(config, modules: dict[str, ModuleType]) -> None:
    """Raise `InputError` for a judge that cannot be loaded, or for what it would lack.

    Before the model is loaded: its answers may take hours. modules: the benchmarks by task.
    """
    if (config.truth_judge is None) != (config.info_judge is None):
        raise InputError("--truth-judge and --info-judge go together: found one of them")
    for role, tasks in ROLES.items():
        folder, flag = getattr(config, role), "--" + role.replace("_", "-")
        if folder is None:
            continue
        judged = [task for task in tasks if task in config.tasks]
        if not judged:
            raise InputError(f"{flag}: found no task for it, expected {' or '.join(tasks)}")
        if not Path(folder).is_dir():
            raise InputError(f"{flag}: {folder}: no such folder")
        Tokenizer(folder).check_fits(read_config(folder).vocab_size)
        weight_files(Path(folder))
        for task in judged:
            modules[task].check_judged(Path(config.data) / task)


def ask_judges(
    config, options: Options, modules: dict[str, ModuleType], records: Records, device: torch.device
) -> None:
    """Let one judge after the other read the answers; their judgements become records.

    Every rank calls it. The model must have left the memory by then.
    """
    for role, tasks in ROLES.items():
        folder = getattr(config, role)
        if folder is None:
            continue
        free(device)
        dtype = getattr(torch, config.dtype)
        slots, compile = config.slots, config.compile
        generator = TextGenerator.from_folder(folder, device, dtype, slots=slots, compile=compile)
        key = weights_key(folder)
        for task in (task for task in tasks if task in modules):
            records.task = f"{task}/{role}"
            modules[task].judge(role, key, generator, records, Path(config.data) / task, options)
        del generator
    free(device)


def free(device: torch.device) -> None:
    """Give back the memory of a model that nobody holds any more."""
    gc.collect()  # a model with graphs of its step is part of a circle
    if device.type == "cuda":
        torch.cuda.empty_cache()


def names_of(folders: dict[str, str]) -> str:
    """The names of judges, of which `folders` has the folders by flag."""
    return " and ".join(Path(folder).resolve().name for folder in folders.values())
