"""Decoding speed of decoding/ beside transformers' generate, one after the other in each round:

    python bench.py generate

Default data: eval/gsm8k/test.jsonl, GSM8K's questions, as prompts in chat format. Same random
weights, prompts and threads; greedy tokens (the number of answers that differ is printed; in fp32
it is 0); one prompt at a time, and 16. Each answer ends after as many tokens as the data set's own
has, so that the lengths vary as real ones do. transformers pads a batch's prompts on the left and
goes on until its last answer has ended; here prompts are packed, and the next one takes the place
of an answer that has ended.

On a GPU the model has Llama 2 7B's shape, in bf16; 64 and 256 at a time are measured, too; beside
transformers with a static cache, which it compiles, and vLLM where it is installed, each in a
process of its own (peers.py); and what must be read (the weights once a step, keys and values) as a
share of the bandwidth that a copy has on the same GPU. First, in a process of its own, what
passes from an empty GPU to the first token. Each case ends after --seconds: an answer of
transformers that is not finished then counts as far as it came.
"""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks import inputs
from benchmarks.loops import clocks, median_ratio
from benchmarks.measure import milliseconds, write
from benchmarks.peers import alone, padded, rate, texts
from checkpoint.config import config_from_dict
from decoding.generator import TextGenerator
from decoding.room import token_bytes
from decoding.sampling import Sampling
from evals.harness import read_jsonl
from model import Llama
from program.errors import amount
from program.flags import parse_args
from program.ranks import start
from tokens.tokenizer import Tokenizer

LONGEST = 192  # tokens of a prompt or an answer on a GPU: an H100 holds 256 sequences of 7B then


class FixedLengths(TextGenerator):
    """Answers end after as many tokens as `lengths` says, and nowhere else; steps are counted."""

    steps = 0

    def next_logits(self, active):
        self.steps += 1
        return super().next_logits(active)

    def take(self, sequence, token, sampling):
        sequence.new.append(token)
        return "length" if len(sequence.new) == self.lengths[sequence.number] else None


@dataclass(frozen=True)
class GenerateBenchConfig(inputs.InputFlags):
    """Flags of `python bench.py generate`."""

    prompts: int = 64  # the first of the file; one at a time an eighth of them
    rounds: int = 5  # in each of them both loops run once, taking turns to begin
    seconds: int = 60  # of each case: rounds that would take longer are left out
    alone: bool | None = None  # also what runs in processes of its own (default: on a GPU)
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/generate.json"  # the figures


def main(arguments):
    """Measure, print each case when it is done, and write the JSON file; returns its figures."""
    config = GenerateBenchConfig(**parse_args(GenerateBenchConfig, arguments))
    _, _, device = start()
    gpu = device.type == "cuda"
    shape = inputs.TOY if config.toy else inputs.LLAMA_2_7B if gpu else inputs.SMALL
    dtype = torch.bfloat16 if gpu else torch.float32
    figures, facts = {}, {"dtype": str(dtype).removeprefix("torch."), "prompts": config.prompts}
    with tempfile.TemporaryDirectory() as folder:
        most = 512 if gpu and not config.toy else config.prompts
        prompts, lengths = first_questions(config, folder, most, LONGEST if gpu else None)
        ours, theirs = models(config, shape, folder, device, dtype)
        apart = gpu if config.alone is None else config.alone
        job = {"folder": folder, "dtype": facts["dtype"], "prompts": prompts, "lengths": lengths}
        if apart:
            theirs.save_pretrained(folder)
            facts["first_token"] = alone("first_token", job, f"{folder}/job.json", config.seconds)
            print("from an empty GPU to tokens, seconds:", texts(facts["first_token"]), flush=True)
        ours.lengths = lengths
        facts["bandwidth"] = copy_bandwidth(device) if gpu else None
        print(f"{'':14}{'tokens/s':>12}{'transformers':>14}{'times':>8}{'by CPU time':>13}")
        for batch in (1, 16, 64, 256) if gpu else (1, 16):
            count = -(-config.prompts // 8) if batch == 1 else max(config.prompts, 2 * batch)
            count = min(count, len(prompts)) if gpu else min(count, config.prompts)
            case = compare(config, ours, theirs, prompts[:count], batch)
            figures[f"batch {batch}"] = case
            show(f"batch {batch}", case, facts["bandwidth"])
            if apart:
                free_cache(ours)
                part = {"prompts": prompts[:count], "lengths": lengths[:count], "batch": batch}
                for program in ("transformers", "vllm"):
                    case[program] = alone(program, job | part, f"{folder}/job.json", config.seconds)
                    print(f"{'':14}{program}, alone: {rate(case[program])}", flush=True)
    facts |= {"model": shape | {"vocab_size": ours.model.config.vocab_size}, "seed": config.seed}
    write("generate", config, arguments, device, **facts, figures=figures)
    return figures


def first_questions(config, folder, most, longest):
    """Token ids of the first `most` questions, and the numbers of tokens of their answers.

    longest: tokens of a question or an answer; others are left out (None: none is). The tokenizer
    is copied to `folder`.
    """
    data = inputs.input_file(config.data, "eval/gsm8k/test.jsonl", "--data")
    inputs.copy_tokenizer(config, folder)
    tokenizer = Tokenizer(folder)
    records = read_jsonl(data, ("question", "answer"))
    turns = ([{"role": "user", "content": record["question"]}] for record in records)
    both = (
        (tokenizer.prompt(turn), len(tokenizer.sp.encode(record["answer"])))
        for turn, record in zip(turns, records, strict=True)
    )
    fitting = ((ids, n) for ids, n in both if longest is None or max(len(ids), n) <= longest)
    prompts, lengths = zip(*itertools.islice(fitting, most), strict=True)
    return list(prompts), list(lengths)


def models(config, shape, folder, device, dtype):
    """Our generator, and transformers' model, with the same random weights."""
    import transformers

    fields = inputs.model_fields(shape, folder)
    torch.manual_seed(config.seed)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        ours = Llama(config_from_dict(fields)).to(dtype)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # one copy of the weights for both
    return FixedLengths(ours, Tokenizer(folder)), theirs


def compare(config, ours, theirs, prompts, batch):
    """Rounds of both: seconds, CPU seconds, tokens, and how many answers differ."""
    end = time.monotonic() + config.seconds
    free_cache(ours)
    ours.cached.slots = ours.cached.most = batch
    ours.cached.by_memory = ours.cached.device.type == "cuda" and batch > 64
    sampling, lengths = Sampling(max(ours.lengths[: len(prompts)])), ours.lengths

    def our_turn():
        ours.steps = 0
        answers = ours.generate(prompts, sampling)
        return [answer.ids for answer in answers]

    def their_turn():
        answers = []
        for i in range(0, len(prompts), batch):
            part = slice(i, min(i + batch, len(prompts)))
            answers += padded(theirs, prompts[part], lengths[part], end)
        return answers

    turns = {"ours": our_turn, "transformers": their_turn}
    answers = {name: turn() for name, turn in turns.items()}  # and to warm up
    different = sum(a[: len(b)] != b for a, b in zip(*answers.values(), strict=True))
    seconds, cpu_seconds, tokens = [], [], []  # of every round, dicts by loop
    first = first_token_seconds(ours, prompts)
    for number in range(config.rounds):
        if number and time.monotonic() + sum(seconds[-1].values()) > end:
            break
        for of_round in (seconds, cpu_seconds, tokens):
            of_round.append({})
        end = max(end, time.monotonic() + config.seconds / 4)  # the first round is always there
        for name in list(turns)[:: 1 if number % 2 else -1]:
            started = clocks()
            tokens[-1][name] = sum(map(len, turns[name]()))
            seconds[-1][name], cpu_seconds[-1][name] = (clocks() - started).round(4).tolist()
    each, cpu_each = (
        [{name: s[name] / t[name] for name in s} for s, t in zip(clock, tokens, strict=True)]
        for clock in (seconds, cpu_seconds)
    )  # seconds of a token
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(lengths[: len(prompts)]),
        "slots": ours.slots,
        "steps": ours.steps,
        "bytes": bytes_read(ours, prompts, lengths),
        "first_token_seconds": first,
        "different_answers": different,
        "tokens_per_second": {n: 1 / statistics.median(s[n] for s in each) for n in turns},
        "speed_up": median_ratio(each, "transformers"),
        "cpu_speed_up": median_ratio(cpu_each, "transformers"),
        "seconds": {name: [s[name] for s in seconds] for name in turns},
        "cpu_seconds": {name: [s[name] for s in cpu_seconds] for name in turns},
    }


def free_cache(ours):
    """Give the memory of keys, values and graphs back, to whoever is next."""
    ours.cached.cache = None
    if ours.cached.graphs:
        ours.cached.graphs.forget()
        torch.cuda.empty_cache()


def first_token_seconds(ours, prompts):
    """Median seconds from a prompt to its first token, everything being compiled."""
    times, plain = [], TextGenerator(ours.model, ours.tokenizer)
    plain.cached = ours.cached
    for prompt in prompts[:5]:
        begin = time.perf_counter()
        list(plain.stream(prompt, Sampling(1)))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def bytes_read(ours, prompts, lengths):
    """Bytes that the last turn must read: weights in each step, keys and values of the past."""
    model = ours.model
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    past = sum(n * len(ids) + n * n // 2 for ids, n in zip(prompts, lengths, strict=False))
    return ours.steps * weights * ours.dtype.itemsize + past * token_bytes(model.config, ours.dtype)


def copy_bandwidth(device):
    """Bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(1 << 31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device) * 1e3


def show(name, case, bandwidth):
    """Print a case: tokens a second of both, and what decoding reads of the memory."""
    ours, theirs = case["tokens_per_second"].values()
    print(
        f"{name:14}{ours:12,.1f}{theirs:14,.1f}{case['speed_up']:8.2f}{case['cpu_speed_up']:13.2f}"
    )
    print(
        f"{'':14}{amount(case['prompts'], 'prompts')} of {case['prompt_tokens']:,} tokens, "
        f"{case['new_tokens']:,} new ones; {case['different_answers']} answers differ"
    )
    read = case["bytes"] / case["new_tokens"] * ours
    share = f", {read / bandwidth:.0%} of a copy's bandwidth" if bandwidth else ""
    print(
        f"{'':14}{1e3 * case['first_token_seconds']:.1f} ms to the first token; {case['slots']} at "
        f"a time read {read / 1e9:.1f} GB of weights, keys and values a second{share}",
        flush=True,
    )
