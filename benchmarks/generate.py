"""Decoding speed of decoding/ beside transformers' generate, one after the other in each round:

    python bench.py generate

Default data: eval/gsm8k/test.jsonl, GSM8K's questions, as prompts in chat format. Same random
weights, prompts and threads; greedy tokens (the number of answers that differ is printed; in fp32
it is 0); one prompt at a time, and 16. Each answer ends after as many tokens as the data set's own
has, so that the lengths vary as real ones do. transformers pads a batch's prompts on the left and
goes on until its last answer has ended; here prompts are packed, and the next one takes the place
of an answer that has ended. On a GPU the model has Llama 2 7B's shape, in bf16, and the share of
the memory's bandwidth is printed: a step for one sequence must read every weight, and that bounds
it.
"""

import statistics
import tempfile
from dataclasses import dataclass

import torch

from benchmarks import inputs
from benchmarks.loops import clocks, median_ratio
from benchmarks.measure import write
from checkpoint.config import config_from_dict
from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals.harness import read_jsonl
from model import Llama
from program.flags import parse_args
from program.ranks import start
from tokens.tokenizer import Tokenizer

# Bytes per second that a GPU reads from its memory, from the vendor's datasheets.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}


class FixedLengths(TextGenerator):
    """Answers end after as many tokens as `lengths` says, and nowhere else."""

    def take(self, sequence, token, sampling):
        sequence.new.append(token)
        return "length" if len(sequence.new) == self.lengths[sequence.number] else None


@dataclass(frozen=True)
class GenerateBenchConfig(inputs.InputFlags):
    """Flags of `python bench.py generate`."""

    prompts: int = 64  # the first of the file; one at a time an eighth of them
    rounds: int = 5  # in each of them both loops run once, taking turns to begin
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/generate.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file; returns its figures."""
    config = GenerateBenchConfig(**parse_args(GenerateBenchConfig, arguments))
    _, _, device = start()
    gpu = device.type == "cuda"
    shape = inputs.TOY if config.toy else inputs.LLAMA_2_7B if gpu else inputs.SMALL
    dtype = torch.bfloat16 if gpu else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        prompts, lengths = first_questions(config, folder)
        ours, theirs = models(config, shape, folder, device, dtype)
    ours.lengths = lengths
    figures = {}
    for batch, count in ((1, -(-config.prompts // 8)), (16, config.prompts)):
        figures[f"batch {batch}"] = compare(config, ours, theirs, prompts[:count], batch)
    weights = [p for name, p in ours.model.named_parameters() if "embed_tokens" not in name]
    gpu_name = torch.cuda.get_device_name(device) if gpu else ""
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in gpu_name), None)
    show(figures, sum(p.numel() for p in weights) * dtype.itemsize, bandwidth)
    facts = {"dtype": str(dtype).removeprefix("torch."), "prompts": config.prompts}
    facts |= {"model": shape | {"vocab_size": ours.model.config.vocab_size}, "seed": config.seed}
    write("generate", config, arguments, device, **facts, figures=figures)
    return figures


def first_questions(config, folder):
    """Token ids of the first questions, and the numbers of tokens of their answers.

    The tokenizer is copied to `folder`.
    """
    data = inputs.input_file(config.data, "eval/gsm8k/test.jsonl", "--data")
    inputs.copy_tokenizer(config, folder)
    records = read_jsonl(data, ("question", "answer"))[: config.prompts]
    tokenizer = Tokenizer(folder)
    turns = [[{"role": "user", "content": record["question"]}] for record in records]
    lengths = [len(tokenizer.sp.encode(record["answer"])) for record in records]
    return [tokenizer.prompt(turn) for turn in turns], lengths


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
    ours.cached.slots, ours.cached.cache = batch, None
    sampling, lengths = Sampling(max(ours.lengths[: len(prompts)])), ours.lengths

    def our_turn():
        answers = ours.generate(prompts, sampling)
        return [answer.ids for answer in answers]

    def their_turn():
        answers = []
        for i in range(0, len(prompts), batch):
            answers += padded(theirs, prompts[i : i + batch], lengths[i : i + batch])
        return answers

    turns = {"ours": our_turn, "transformers": their_turn}
    answers = {name: turn() for name, turn in turns.items()}  # and to warm up
    different = sum(a != b for a, b in zip(*answers.values(), strict=True))
    seconds, cpu_seconds = [], []  # of every round, dicts by loop
    for number in range(config.rounds):
        seconds.append({})
        cpu_seconds.append({})
        for name in list(turns)[:: 1 if number % 2 else -1]:
            started = clocks()
            turns[name]()
            seconds[-1][name], cpu_seconds[-1][name] = (clocks() - started).round(4).tolist()
    tokens = sum(lengths[: len(prompts)])
    medians = {name: statistics.median(s[name] for s in seconds) for name in turns}
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": tokens,
        "different_answers": different,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "speed_up": median_ratio(seconds, "transformers"),
        "cpu_speed_up": median_ratio(cpu_seconds, "transformers"),
        "seconds": {name: [s[name] for s in seconds] for name in turns},
        "cpu_seconds": {name: [s[name] for s in cpu_seconds] for name in turns},
    }


def padded(model, prompts, lengths):
    """transformers' greedy answers of these lengths to a batch of prompts, padded on the left."""
    import transformers

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ends = longest + torch.tensor(lengths, device=model.device)

    class AllLongEnough(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] >= ends

    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(lengths),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([AllLongEnough()]),
    )
    return [row[longest : longest + n].tolist() for row, n in zip(out, lengths, strict=True)]


def show(figures, weight_bytes, bandwidth):
    """Print the table, and for one sequence what the weights alone would take."""
    print(f"{'':14}{'tokens/s':>12}{'transformers':>14}{'times':>8}{'by CPU time':>13}")
    for name, f in figures.items():
        ours, theirs = f["tokens_per_second"].values()
        print(f"{name:14}{ours:12,.1f}{theirs:14,.1f}{f['speed_up']:8.2f}{f['cpu_speed_up']:13.2f}")
        print(
            f"{'':14}{f['prompts']} prompts of {f['prompt_tokens']:,} tokens, {f['new_tokens']:,} "
            f"new ones; {f['different_answers']} answers differ"
        )
    read = weight_bytes * figures["batch 1"]["tokens_per_second"]["ours"]
    share = f", {read / bandwidth:.0%} of the memory's bandwidth" if bandwidth else ""
    print(f"One at a time reads {read / 1e9:.1f} GB of weights a second{share}.")
