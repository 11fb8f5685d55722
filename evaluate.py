"""The paper's benchmarks, run on a Llama in a Hugging Face folder.

    python evaluate.py                                                  the demo's model and tasks
    python evaluate.py --model DIR --data DIR --tasks mmlu gsm8k --out results.json
    torchrun --nproc_per_node 8 evaluate.py …               each GPU takes a share of the prompts

The folder of --data holds one folder for each task, named like the task, with the benchmark's files
under their published names (evals/README.md lists them). results.json gets the scores. Beside it,
results.jsonl gets a line for each prompt with completion and verdict: it is there to be looked at,
and an interrupted evaluation continues from it. With --truth-judge and --info-judge (TruthfulQA) or
--judge (AlpacaEval, MT-Bench), Llamas judge the answers once the model has left the memory.

Source: Ivison et al. 2023 (arXiv 2311.10702), appendix A; open-instruct eval/ of November 2023.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import dataclasses
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.config import read_config
from checkpoint.run_folder import append_record
from checkpoint.weights import weight_files
from decoding.generator import TextGenerator
from demo.compare import newest_model
from evals.harness import Options, Records, digest_of
from evals.judges import ask_judges, check_judges, judges_of
from program.errors import InputError, reported
from program.files import digest, hold, whole_lines, written_aside
from program.flags import check_bounds, parse_args
from program.hardware import environment
from program.ranks import gather_lists, leave, own_share, start
from tokens.folder import tokenizer_file

TASKS = (
    "mmlu", "gsm8k", "bbh", "tydiqa", "humaneval", "truthfulqa", "toxigen", "alpaca_eval",
    "mt_bench", "demo",
)  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """The flags of evaluate.py. The defaults are the paper's settings."""

    model: str | None = None  # Hugging Face folder (default: the demo's newest model)
    tasks: list[str] | None = None  # benchmarks to run (default: demo)
    data: str | None = None  # folder that holds a folder of published files for each task
    out: str = "runs/eval/results.json"  # scores; every prompt and answer in .jsonl beside it
    truth_judge: str | None = None  # folder of a Llama that judges TruthfulQA's answers: true?
    info_judge: str | None = None  # folder of a Llama that judges them: informative?
    judge: str | None = None  # folder of a Llama that judges for AlpacaEval and MT-Bench
    full: bool = False  # ask all items, also where the paper drew a sample
    chat: bool = True  # ask in Tulu's chat format; --no-chat for a base model
    mmlu_shots: int = 0  # examples before an MMLU question (the paper reports 0; 5 is usual)
    slots: int | None = None  # sequences at a time (default: 16; on a GPU what its memory holds)
    context: int = 0  # maximum tokens of prompt and answer together (0: the model's limit)
    seed: int = 42  # of the samples of items and of tokens
    dtype: str | None = None  # bfloat16 or float32 (default: bfloat16 on a GPU)
    compile: bool = True  # on a GPU: compile a block and record a step, which takes seconds


# Table 1 of the paper (percent; arXiv 2311.10702v2), and TruthfulQA from table 2, which leaves out
# DPO because its data hold TruthfulQA's questions. Codex-Eval (humaneval) is pass@10; for ToxiGen
# less is better. The columns are those of COLUMNS.
PAPER = {
    "Tulu 2 7B": (50.4, 34.0, 48.5, 46.4, 36.9, 7.0, 73.9, 50.2),
    "Tulu 2+DPO 7B": (50.7, 34.5, 45.5, 44.5, 40.0, 0.5, 85.1, None),
    "Tulu 2 13B": (55.4, 46.0, 49.5, 53.2, 49.0, 1.7, 78.9, 55.8),
    "Tulu 2+DPO 13B": (55.3, 49.5, 49.4, 39.7, 48.9, 1.1, 89.5, None),
    "Tulu 2 70B": (67.3, 73.0, 68.4, 53.6, 68.5, 0.5, 86.6, 62.2),
    "Tulu 2+DPO 70B": (67.8, 71.5, 66.0, 35.8, 68.9, 0.2, 95.1, None),
}
COLUMNS = ("mmlu", "gsm8k", "bbh", "tydiqa", "humaneval", "toxigen", "alpaca_eval", "truthfulqa")


def main(flags: dict) -> None:
    rank, world, device = start()
    config = with_defaults(EvalConfig(**flags), device)
    options = Options(config.full, config.chat, config.mmlu_shots, config.seed)
    modules = {task: importlib.import_module(f"evals.{task}") for task in config.tasks}
    hashes = {}
    for task, module in modules.items():  # bad data shows now, before the model is loaded
        folder = Path(config.data) / task
        items = module.load(folder, options)
        if not items:
            raise InputError(f"{folder}: found no questions, expected one or more")
        hashes[task] = digest_of(items)
    check_judges(config, modules)
    run = run_facts(config)
    out, lines = Path(config.out), Path(config.out).with_suffix(".jsonl")
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(lines, "a")  # closed, and so released, when this function returns
        hold(lock, out)
    dist.barrier()  # until rank 0 holds the lock, another evaluation may write there
    records = Records(lines, earlier_records(lines, run))

    generator = TextGenerator.from_folder(
        config.model, device, getattr(torch, config.dtype), run["context"], config.slots,
        config.compile,
    )  # fmt: skip
    records.per_rank = max(records.per_rank, 4 * generator.most)  # a GPU may hold hundreds
    dist.barrier()  # all ranks have read `lines` before rank 0 adds to it
    if rank == 0:
        append_record(lines, {"event": "start", "run": run, "items_sha256": hashes})
    results = {
        "model": str(config.model),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(config),
        "environment": environment(device, world),
        "tasks": {},
    }
    for task, module in modules.items():
        records.task, began = task, time.perf_counter()
        result = module.evaluate(generator, records, Path(config.data) / task, options)
        result |= {"items_sha256": hashes[task], "seconds": round(time.perf_counter() - began, 1)}
        results["tasks"][task] = result
        write_scores(out, results)
    del generator  # the judges need its memory
    ask_judges(config, options, modules, records, device)
    for task, result in results["tasks"].items():
        if folders := judges_of(config, task):
            folder = Path(config.data) / task
            results["tasks"][task] = modules[task].judged(records, folder, options, folders, result)
            write_scores(out, results)
    if rank == 0:
        print(table(results), *remarks(results["tasks"]), sep="\n")
        print(f"{out}: the scores; {lines}: every prompt and answer")


def write_scores(path: Path, results: dict) -> None:
    """Write the results so far, on rank 0."""
    if dist.get_rank() == 0:
        with written_aside(path) as file:
            file.write(json.dumps(results, indent=1) + "\n")


def with_defaults(config: EvalConfig, device: torch.device) -> EvalConfig:
    """The config with its defaults filled in. Raises `InputError` for a bad value of a flag."""
    check_bounds(config)
    if config.model is None:
        config = dataclasses.replace(config, model=str(newest_model()))
    if config.tasks is None:
        config = dataclasses.replace(config, tasks=["demo"], data=config.data or "runs")
    unknown = [task for task in config.tasks if task not in TASKS]
    if unknown or len(set(config.tasks)) < len(config.tasks):
        wrong = unknown[0] if unknown else "a task twice"
        raise InputError(f"--tasks: found {wrong}, expected some of {', '.join(TASKS)}")
    if config.data is None:
        raise InputError("found no --data DIR, expected a folder with a folder for each task")
    if Path(config.out).suffix != ".json" or Path(config.out).is_dir():
        raise InputError(f"--out is {config.out}, expected a file whose name ends in .json")
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return dataclasses.replace(config, dtype=dtype)


def run_facts(config: EvalConfig) -> dict:
    """What decides the answers, to tell evaluations apart: the model's content, not its path."""
    folder = Path(config.model)
    context = config.context or read_config(folder).max_position_embeddings
    paths = [*weight_files(folder), folder / "config.json", tokenizer_file(folder)]
    digests = gather_lists([digest(folder / name) for name in own_share(p.name for p in paths)])
    names = ("full", "chat", "mmlu_shots", "seed", "dtype")
    facts = {name: getattr(config, name) for name in names}
    key = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
    return {"model": key, "context": context, **facts}


def earlier_records(path: Path, run: dict) -> list[dict]:
    """The records of an interrupted evaluation. Raises `InputError` for those of another one.

    A last line that a kill cut short is removed from the file.
    """
    if not path.exists():
        return []
    lines = whole_lines(path)
    size = sum(map(len, lines))
    if dist.get_rank() == 0 and path.stat().st_size > size:
        os.truncate(path, size)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: found no JSON object, expected a record") from None
        earlier = records[-1].get("run", run)  # a start record has the facts of its run
        for name, value in run.items():
            if earlier.get(name) != value:
                raise InputError(
                    f"--out {path.with_suffix('.json')}: holds another evaluation, with {name} "
                    f"{earlier.get(name)!r} where this one has {value!r}"
                )
    return [record for record in records if "task" in record]


def table(results: dict) -> str:
    """The scores with their standard errors, above the paper's scores of the same tasks."""
    tasks = results["tasks"]
    shown = {task for task in tasks if is_the_papers(task, tasks[task])}
    rows = [("", *tasks), ("", *(result["metric"] for result in tasks.values()))]
    rows.append((Path(results["model"]).name, *(score_text(result) for result in tasks.values())))
    if shown:
        for name, scores in PAPER.items():
            scores = dict(zip(COLUMNS, scores, strict=True))
            cells = (scores[task] if task in shown else None for task in tasks)
            rows.append((name, *("" if score is None else f"{score:.1f}" for score in cells)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def is_the_papers(task: str, result: dict) -> bool:
    """Whether the paper's column of a task is for what `result` has, or will have from its judge.

    MC2 of TruthfulQA is another metric, a win rate by another judge than GPT-4 not comparable.
    """
    return task in COLUMNS and ("judges" in result) == (task == "truthfulqa")


def remarks(tasks: dict[str, dict]) -> Iterator[str]:
    """Lines about scores by judges, and about answers that still wait for one."""
    for task, result in tasks.items():
        if "note" in result:
            unreadable = result.get("unreadable")
            more = f"; {unreadable} of {result['judgements']} unreadable" if unreadable else ""
            yield f"{task}: {result['note']}{more}"
        elif "judge" in result:
            yield f"{task}: {result['outputs']} is for the judge: {result['judge']}"


def score_text(result: dict) -> str:
    """Score and standard error. A task without a score needs its judge."""
    if result["score"] is None:
        return "see below"
    error = f" ± {result['stderr']:.1f}" if result["stderr"] is not None else ""
    return f"{result['score']:.1f}{error}"


if __name__ == "__main__":
    with reported():
        main(parse_args(EvalConfig))
        leave()
