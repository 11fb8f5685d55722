"""HumanEval: functions written from their docstrings, judged by running their tests.

The paper's Codex-Eval: 164 problems, the bare function header without chat format (Tulu models,
too), 20 samples of each at temperature 0.8 and top-p 0.95, at most 512 new tokens, ended before a
line that begins with class, def, #, if or print; a program has 3 seconds. The score is pass@10, the
probability that at least one of 10 samples passes, by the unbiased estimator of Chen et al. 2021
(arXiv 2107.03374, equation 1). pass@1 of the same samples stands beside it; the original's other
run, at temperature 0.1, gives a higher one.

Source: Ivison et al. 2023, appendix A; open-instruct eval/codex_humaneval/ and
scripts/submit_eval_jobs.py. File: HumanEval.jsonl.gz of openai/human-eval.

Where ours differs: the original runs a program in a fork of the evaluation itself, whose functions
it sets to None; ours runs it shut in (evals/sandbox.py), where it may read files and write none.
Early versions of vLLM could lose the space a completion begins with; ours keeps it.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

from decoding.sampling import Sampling
from evals import sandbox
from evals.harness import finishes, mean_and_error, need, read_jsonl, record_of, result, seed_of
from program.errors import InputError

SAMPLES = 20  # of each problem
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SECONDS = 3.0
FIELDS = ("task_id", "prompt", "entry_point", "test")


def load(folder, options):
    """The samples to draw: 20 items of each problem, one after the other.

    Raises `InputError` for a bad file, and where programs cannot be shut in.
    """
    sandbox.check()
    path = need(folder, "HumanEval.jsonl.gz")
    problems = read_jsonl(path, FIELDS)
    for number, problem in enumerate(problems, 1):
        for field in FIELDS:
            if not isinstance(problem[field], str):
                raise InputError(f"{path}:{number}: {field} is no string")
    if len({problem["task_id"] for problem in problems}) < len(problems):
        raise InputError(f"{path}: found a task_id twice, expected each once")
    return [
        {"id": f"{problem['task_id']}/{sample}", **problem}
        for problem in problems
        for sample in range(SAMPLES)
    ]


def prompt(tokenizer, item, options):
    """Token ids of the function's header and docstring as they stand."""
    return tokenizer.raw(item["prompt"])


def program(item, text):
    """The function with its tests, as Python source that raises where the function is wrong."""
    return f"{item['prompt']}{text}\n{item['test']}\ncheck({item['entry_point']})"


def score(item, text):
    """Whether the completed function passes its tests, and what happened."""
    outcome = sandbox.run(program(item, text), SECONDS)
    return {"passed": outcome == "passed", "outcome": outcome}


def pass_at_k(samples, passed, k):
    """Probability that k of the samples, drawn without replacement, hold one that passed."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def evaluate(generator, records, folder, options):
    """pass@10 in percent, with pass@1 and what became of the programs."""
    items = load(folder, options)
    sampling = Sampling(512, temperature=0.8, top_p=0.95, stop=STOP, seed=options.seed)
    # The ranks on this machine share its cores: a program that waits for one may run out of time.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, cores)) as pool:
        for own in records.pending(items, per_rank=8 * SAMPLES):
            prompts = [prompt(generator.tokenizer, item, options) for item in own]
            seeds = [seed_of(item) for item in own]
            answers = generator.generate(prompts, sampling, seeds, records.advance)
            verdicts = pool.map(score, own, [answer.text for answer in answers])
            records.add(
                [
                    record_of(generator.tokenizer, item, ids, answer) | verdict
                    for item, ids, answer, verdict in zip(
                        own, prompts, answers, verdicts, strict=True
                    )
                ]
            )
    found = records.of(items)
    passed = {}  # task_id → how many of its samples
    for item, record in zip(items, found, strict=True):
        passed[item["task_id"]] = passed.get(item["task_id"], 0) + record["passed"]
    at = {k: [pass_at_k(SAMPLES, c, k) for c in passed.values()] for k in (1, 10)}
    return result(
        "pass@10",
        *mean_and_error(at[10]),
        len(passed),
        {"samples": SAMPLES, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 512,
         "seconds": SECONDS, "sandbox": sandbox.check()},
        pass_at_1=mean_and_error(at[1])[0],
        pass_at_1_stderr=mean_and_error(at[1])[1],
        timed_out=sum(record["outcome"] == "timed out" for record in found),
        finishes=finishes(found),
    )  # fmt: skip
