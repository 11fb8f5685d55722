"""What `bench.py generate` starts in processes of their own, which can be ended when time is over:

    python bench.py peers --program first_token --job FILE    ours: from a folder to the first token
    python bench.py peers --program transformers --job FILE   its static cache, compiled
    python bench.py peers --program vllm --job FILE

The job is JSON: folder (of a model), prompts (lists of ids), lengths (of the answers), batch,
dtype, seconds. The last line that is printed is JSON: what was measured.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start


@dataclass(frozen=True)
class PeersConfig:
    """Flags of `python bench.py peers`."""

    program: str | None = None  # first_token, transformers or vllm
    job: str | None = None  # a JSON file


def main(arguments):
    """Run one program and print its figures as JSON; returns them."""
    config = PeersConfig(**parse_args(PeersConfig, arguments))
    if config.program not in PROGRAMS or config.job is None:
        raise InputError(f"expected --job FILE and --program, one of {', '.join(PROGRAMS)}")
    _, _, device = start()
    figures = PROGRAMS[config.program](json.loads(Path(config.job).read_text()), device)
    print(json.dumps(figures))
    return figures


def first_token(job, device):
    """Seconds of loading a folder, of the first token after it, and of what the second needs."""
    begin = time.perf_counter()
    dtype = getattr(torch, job["dtype"])
    generator = TextGenerator.from_folder(job["folder"], device, dtype, slots=1)
    prompt, figures = job["prompts"][0], {"loading": time.perf_counter() - begin}
    for name, tokens in (("first token", 1), ("nine tokens", 9), ("nine tokens again", 9)):
        begin = time.perf_counter()
        list(generator.stream(prompt + [3] * len(figures), Sampling(tokens)))
        figures[name] = time.perf_counter() - begin
    graphs = generator.cached.graphs  # what the second token waits for, once
    return figures | (graphs.seconds if graphs else {})


def transformers(job, device):
    """transformers with a static cache, which it compiles by itself on a GPU."""
    import transformers

    dtype = getattr(torch, job["dtype"])
    model = transformers.LlamaForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    model = model.eval().to(device)
    batch, end = job["batch"], time.monotonic() + job["seconds"]

    def turn(prompts, lengths):
        longest = max(map(len, job["prompts"])), max(job["lengths"])  # one shape for all batches
        answers = []
        for i in range(0, len(prompts), batch):
            part = slice(i, i + batch)
            answers += padded(model, prompts[part], lengths[part], end, longest)
        return sum(map(len, answers))

    begin = time.perf_counter()
    first = job["prompts"][:batch]
    turn(first, [4] * len(first))
    warm = time.perf_counter()
    tokens = turn(job["prompts"], job["lengths"])
    return {"compiling": warm - begin, "tokens": tokens, "seconds": time.perf_counter() - warm}


def padded(model, prompts, lengths, end=float("inf"), fixed=None):
    """transformers' greedy answers of these lengths to a batch of prompts, padded on the left.

    Answers that are not finished at the time `end` are cut off. fixed: tokens of the longest prompt
    and answer, for a static cache of that size.
    """
    import transformers

    longest, most = fixed or (max(map(len, prompts)), max(lengths))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ends = longest + torch.tensor(lengths, device=model.device)

    class AllLongEnough(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            late = time.monotonic() > end
            return (
                torch.full_like(ends, True, dtype=torch.bool)
                if late
                else (input_ids.shape[1] >= ends)
            )

    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([AllLongEnough()]),
        cache_implementation="static" if fixed else None,
    )
    return [row[longest : longest + n].tolist() for row, n in zip(out, lengths, strict=True)]


def vllm(job, device):
    """vLLM, which schedules by itself; with random weights, no matter which."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    free, total = torch.cuda.mem_get_info()
    longest = max(map(len, job["prompts"])) + max(job["lengths"])
    model = LLM(
        job["folder"], load_format="dummy", dtype=job["dtype"], skip_tokenizer_init=True,
        max_model_len=longest, max_num_seqs=job["batch"],
        gpu_memory_utilization=round(0.9 * free / total, 2), enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in job["lengths"]
    ]
    warm = time.perf_counter()
    answers = model.generate(prompts, sampling, use_tqdm=False)
    seconds, tokens = time.perf_counter() - warm, sum(len(a.outputs[0].token_ids) for a in answers)
    return {"compiling": warm - begin, "tokens": tokens, "seconds": seconds}


PROGRAMS = {"first_token": first_token, "transformers": transformers, "vllm": vllm}


def alone(program, job, path, seconds):
    """The figures of a program in a process of its own, or why there are none, as a dict.

    path: where the job is written to. The process, and what it started, is ended after `seconds`.
    """
    Path(path).write_text(json.dumps(job | {"seconds": seconds}))
    command = [sys.executable, "bench.py", "peers", "--program", program, "--job", str(path)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done after {seconds:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        return {"skipped": (errors.strip().splitlines() or ["no reason given"])[-1][:200]}
    return json.loads(out.strip().splitlines()[-1])


def rate(figures):
    """Tokens a second of a program that ran alone, or why there are none."""
    if "skipped" in figures:
        return figures["skipped"]
    speed = figures["tokens"] / figures["seconds"]
    return f"{speed:,.1f} tokens/s after {figures['compiling']:.1f} s of compiling"


def texts(figures):
    """A dict of seconds in a line."""
    return ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in figures.items()
    )
