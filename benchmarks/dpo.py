"""Training speed of dpo.py beside a plain transformers loop and TRL, one update of each in turn:

    python bench.py dpo --data FILE --tokenizer DIR

Default data: prefs/alpaca_eval_tulu2_13b.jsonl. Same initial weights, pairs, order, rates, fused
AdamW, clipping and threads; the reference's log-probabilities are computed beforehand and not
timed. The losses must agree: ln 2 in the first update, and in the later ones what the gradients
made of it. The transformers loop is the usual one: the chosen and then the rejected answers of 1, 4
or 16 pairs in one padded batch, log-softmax over all logits; the smaller the batch, the less of it
is padding. TRL's DPOTrainer takes part where it is installed: batches of 4 pairs, its defaults but
for recomputation, which would only slow it down. CPU time is shown too, for machines that do other
work. With `--context 4`, say, prompts are long: our loop computes them once a pair.
"""

import dataclasses
import functools
import json
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec

import torch

import dpo
from benchmarks import inputs, loops
from benchmarks.measure import write
from benchmarks.trl_trainer import TRLLoop
from checkpoint.config import read_config
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start
from tokens.records import encode_pair
from training.update import model_flops

PADDED = (1, 4, 16)  # pairs in one padded batch of the transformers loops
# Log-probabilities of thousands in fp32 are 1e-4 off, of which the loss takes beta; Adam's first
# update moves every weight by the whole rate, also those whose gradient is rounding noise.
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DPOBenchConfig(inputs.InputFlags):
    """Flags of `python bench.py dpo`."""

    pairs: int = 96  # the first of the file
    context: int = 0  # questions and answers of sft/code_alpaca_gsm8k.jsonl before each prompt
    max_seq_len: int = 512  # tokens of prompt and answer; a longer one is cut on the right
    batch_size: int = 32  # pairs in one update
    epochs: int = 1  # passes over them
    micro_tokens: int = 16384  # most tokens in one forward pass of our loop
    beta: float = 0.1  # how strongly the reference holds
    lr: float = 1e-5  # first rate, linear to 0; high, so that wrong gradients show in the losses
    trl: bool = True  # beside TRL's DPOTrainer, if it is installed
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/dpo.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = DPOBenchConfig(**parse_args(DPOBenchConfig, arguments))
    _, _, device = start()
    if device.type != "cpu":
        raise InputError("bench.py dpo compares on CPU, and found a GPU")
    with tempfile.TemporaryDirectory() as folder:
        given = after_turns(config, folder) if config.context else config
        documents = first_pairs(given, folder)
        model = inputs.make_model(config, folder)
        shape = read_config(folder)
        names = ("max_seq_len", "batch_size", "epochs", "micro_tokens", "beta", "lr", "seed")
        flags = {name: getattr(config, name) for name in names} | {"warmup_ratio": 0.0}
        flags |= {"model": folder, "data": [f"{folder}/data.jsonl"], "out": f"{folder}/out"}
        others = padded_loops(dpo.DPOConfig(**flags), documents)
        trl = bool(config.trl and find_spec("trl"))
        if trl:
            others["TRL, 4"] = TRLLoop(dpo.DPOConfig(**flags), documents)
        updates = loops.run_in_turns(dpo, flags, others)
    figures = loops.figures(updates, documents, functools.partial(loop_flops, shape), "pairs")
    loops.show(figures, "pairs")
    share = figures["trained_tokens"] / figures["tokens"]
    print(f"{share:.0%} of {figures['tokens']:,} tokens trained.")
    if not trl:
        print("TRL took no part: not installed, or --no-trl.")
    figures = {"pairs": len(documents), **figures}
    write("dpo", config, arguments, device, dtype="float32", model=model, **figures)
    loops.check_losses(figures, LOSS_TOLERANCE)


def first_pairs(config, folder):
    """The first pairs of the file."""
    default, length = "prefs/alpaca_eval_tulu2_13b.jsonl", config.max_seq_len
    return inputs.first_documents(config, default, config.pairs, folder, length, encode_pair, 2)


def after_turns(config, folder):
    """The config, with --context's turns of another task before each pair of its data."""
    turns = inputs.input_file(None, "sft/code_alpaca_gsm8k.jsonl", "--context")
    turns = [json.loads(line)["messages"] for line in turns.open(encoding="utf-8")]
    turns = [messages for messages in turns if len(messages) == 2]
    pairs = inputs.input_file(config.data, "prefs/alpaca_eval_tulu2_13b.jsonl", "--data")
    with open(f"{folder}/after-turns.jsonl", "w", encoding="utf-8") as file:
        for number, line in enumerate(pairs.read_text("utf-8").splitlines()[: config.pairs]):
            record, first = json.loads(line), number * config.context
            before = sum(turns[first : first + config.context], [])
            sides = {side: before + record[side] for side in ("chosen", "rejected")}
            file.write(json.dumps(sides) + "\n")
    return dataclasses.replace(config, data=file.name)


def padded_loops(config, documents):
    """The transformers loops by name, with one reference for all of them."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    with torch.no_grad():
        references = [padded_logps(model, documents, [i]) for i in range(len(documents))]
    loss = functools.partial(pairs_loss, documents, torch.cat(references, 1), config.beta)
    return {f"transformers, {rows}": loops.PaddedLoop(config, rows, loss) for rows in PADDED}


def pairs_loss(documents, references, beta, model, batch, members):
    """The DPO loss of a padded batch, as its share of the update's; references (2, pairs)."""
    chosen, rejected = beta * (padded_logps(model, documents, batch) - references[:, batch])
    return -torch.nn.functional.logsigmoid(chosen - rejected).sum() / len(members)


def padded_logps(model, documents, pairs):
    """Summed log-probabilities (2, n) of the chosen and the rejected answers of n pairs."""
    batch = loops.pad([documents[i][side] for side in (0, 1) for i in pairs])
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    trained = labels != -100
    logps = logits.log_softmax(-1).gather(2, labels.where(trained, 0)[..., None])[..., 0]
    return (logps * trained).sum(1).view(2, -1)


def loop_flops(shape, name, lengths, trained, shared):
    """FLOPs of an update of pairs whose chosen, rejected, chosen, … are of these lengths.

    shared: the tokens of each that are computed once, in our loop, for both answers.
    """
    head = 2 * shape.vocab_size * shape.hidden_size  # of one product, per token
    if name == "ours":  # logits, and once more in backward, where the loss's gradient is known
        return model_flops(shape, lengths, trained, shared) + head * int(trained)
    rows = 2 * int(name.split()[-1])
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    positions = sum(len(batch) * int(max(batch)) for batch in batches)
    # TRL makes the logits twice as we do, but on CPU at every position.
    return loops.padded_flops(shape, lengths, rows) + name.startswith("TRL") * head * positions
