"""HumanEval: functions written from their docstrings, judged by running their tests.

The paper's Codex-Eval: 164 problems. The prompt is the bare function header without chat format,
for Tulu models, too. 20 samples of each problem are drawn at temperature 0.8 and top-p 0.95, with
at most 512 new tokens. A sample ends before a line that begins with class, def, #, if or print; its
program may run for 3 seconds. The score is pass@10, the probability that at least one of 10 samples
passes, by the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1). pass@1 of the
same samples stands beside it; the original's other run, at temperature 0.1, gives a higher pass@1.

Source: Ivison et al. 2023, appendix A; open-instruct eval/codex_humaneval/ and
scripts/submit_eval_jobs.py. File: HumanEval.jsonl.gz of openai/human-eval.

Where ours differs: the original runs a program in a fork of the evaluation itself and sets some of
that process's functions to None. Ours runs it in a sandbox (evals/sandbox.py), where it can read
files but write none. Early versions of vLLM could lose the space at the beginning of a completion;
ours keeps it.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals import sandbox
from evals.harness import (
    Options,
    Records,
    answer_all,
    finishes,
    mean_and_error,
    published,
    read_jsonl,
    result,
)
from program.errors import InputError
from tokens.tokenizer import Tokenizer

SAMPLES = 20  # of each problem
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SECONDS = 3.0
FIELDS = {"task_id": str, "prompt": str, "entry_point": str, "test": str}


def load(folder: Path, options: Options) -> list[dict]:
    """The samples to draw: 20 items of each problem, one after the other.

    Raises `InputError` for a bad file, and on a machine without a sandbox.
    """
    sandbox.check()
    path = published(folder, "HumanEval.jsonl.gz")
    problems = read_jsonl(path, FIELDS)
    if len({problem["task_id"] for problem in problems}) < len(problems):
        raise InputError(f"{path}: found a task_id twice, expected each once")
    return [
        {"id": f"{problem['task_id']}/{sample}", **problem}
        for problem in problems
        for sample in range(SAMPLES)
    ]


def prompt(tokenizer: Tokenizer, item: dict, options: Options) -> list[int]:
    """Token ids of the function's header and docstring, without chat format."""
    return tokenizer.raw(item["prompt"])


def program(item: dict, text: str) -> str:
    """Python source of the function and its tests. It raises if the function is wrong."""
    return f"{item['prompt']}{text}\n{item['test']}\ncheck({item['entry_point']})"


def score(item: dict, text: str) -> dict:
    """Whether the completed function passes its tests, and the sandbox's verdict in words."""
    outcome = sandbox.run(program(item, text), SECONDS)
    return {"passed": outcome == "passed", "outcome": outcome}


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement, passed."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """pass@10 in percent, with pass@1 and the number of programs that ran out of time."""
    items = load(folder, options)
    sampling = Sampling(512, temperature=0.8, top_p=0.95, stop=STOP, seed=options.seed)

    def make_prompt(item):
        return prompt(generator.tokenizer, item, options), {}

    # The ranks on this machine share its cores, and a program that waits for a core may run out of
    # time: so no more programs at once than this rank's share of the cores.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, cores)) as pool:
        answered = answer_all(
            generator, records, items, make_prompt, score, sampling,
            per_rank=8 * SAMPLES, mapper=pool.map,
        )  # fmt: skip
    passed = {}  # task_id → number of its samples that passed
    for item, record in zip(items, answered, strict=True):
        passed[item["task_id"]] = passed.get(item["task_id"], 0) + record["passed"]
    at = {k: [pass_at_k(SAMPLES, n, k) for n in passed.values()] for k in (1, 10)}
    pass_at_1, pass_at_1_stderr = mean_and_error(at[1])
    return result(
        "pass@10",
        *mean_and_error(at[10]),
        len(passed),
        {"samples": SAMPLES, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 512,
         "seconds": SECONDS, "sandbox": sandbox.check()},
        pass_at_1=pass_at_1,
        pass_at_1_stderr=pass_at_1_stderr,
        timed_out=sum(record["outcome"] == "timed out" for record in answered),
        finishes=finishes(answered),
    )  # fmt: skip
