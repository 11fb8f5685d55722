"""Training speed of dpo.py's loop beside a plain transformers loop and TRL, an update each in turn:

    python bench.py dpo --data FILE --tokenizer DIR

Same initial weights, pairs, order, fused AdamW, clipping and threads; the reference's
log-probabilities are computed beforehand and not timed. The losses must agree: ln 2 in the first
update, and in the later ones what the gradients made of it. The transformers loop is the usual one:
the chosen and then the rejected answers of 1, 4 or 16 pairs in one padded batch, log-softmax over
all logits; the smaller the batch, the less of it is padding. TRL's DPOTrainer takes part where it
is installed: batches of 4 pairs, its defaults but for recomputation, which would only slow it down.
Its own loop runs, and the others between its updates. CPU time is shown too, for machines that do
other work.
"""

import statistics
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

import dpo
from benchmarks.loops import (
    HEADS,
    REAL,
    TOY,
    clocks,
    figures,
    first_documents,
    make_model,
    pad,
    padded_flops,
    show,
    take_turns,
)
from benchmarks.measure import write
from benchmarks.trl_trainer import trl_trainer
from checkpoint.config import read_config
from checkpoint.weights import load_hf, weights_key
from data import plan_rows, update_members
from model import Llama
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start
from tokens.records import encode_pair
from training.parallel import shard
from training.reference import answer_logps, reference_logps
from training.update import clip_gradients, make_optimizer, model_flops

PADDED = (1, 4, 16)  # pairs in one padded batch of the transformers loops
# Log-probabilities of thousands in fp32 are 1e-4 off, of which the loss takes beta; Adam's first
# update moves every weight by the whole rate, also those whose gradient is rounding noise.
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DPOBenchConfig:
    """Flags of `python bench.py dpo`."""

    data: str | None = None  # pairs (default: alpaca_eval_tulu2_13b.jsonl of $TULU_DATA)
    tokenizer: str | None = None  # folder of a tokenizer.model (default: Llama 2's of $TULU_DATA)
    pairs: int = 96  # the first of the file
    max_seq_len: int = 512  # tokens of prompt and answer; a longer one is cut on the right
    batch_size: int = 32  # pairs in one update
    epochs: int = 1  # passes over them
    micro_tokens: int = 16384  # most tokens in one forward pass of our loop
    beta: float = 0.1  # DPO's temperature
    lr: float = 1e-5  # constant, and high for DPO, so that wrong gradients would show in the losses
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # largest global norm of the gradients
    seed: int = 42  # of the weights and of the order
    toy: bool = False  # a tiny model, to rehearse
    trl: bool = True  # beside TRL's DPOTrainer, if it is installed
    out: str = "results/dpo.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = DPOBenchConfig(**parse_args(DPOBenchConfig, arguments))
    _, _, device = start()
    if device.type != "cpu":
        raise InputError("bench.py dpo compares on CPU, and found a GPU")
    with tempfile.TemporaryDirectory() as folder:
        documents = first_pairs(config, folder)
        make_model(config, folder)
        shape = read_config(folder)
        ours = OurLoop(config, folder, documents)
        loops = {"ours": ours}
        for rows in PADDED:
            theirs = TheirLoop(config, folder, documents, rows, ours.references)
            loops[f"transformers, {rows}"] = theirs
        trl = bool(config.trl and find_spec("trl"))
        updates = measure(config, documents, loops, folder if trl else None)
    found = summarise(documents, shape, updates)
    show(found, "pairs")
    print(f"{found['trained_tokens'] / found['tokens']:.0%} of {found['tokens']:,} tokens trained.")
    if not trl:
        print("TRL took no part: not installed, or --no-trl.")
    command = " ".join(["python bench.py dpo", *arguments])
    model = {**(TOY if config.toy else REAL), **HEADS}
    write(config.out, command, device, dtype="float32", toy=config.toy, model=model, **found)
    if not found["largest_loss_difference"] < LOSS_TOLERANCE:
        raise AssertionError(f"losses differ by {found['largest_loss_difference']:.1e} of them")


def first_pairs(config, folder):
    """The first pairs of the file."""
    default, length = "prefs/alpaca_eval_tulu2_13b.jsonl", config.max_seq_len
    return first_documents(config, default, config.pairs, folder, length, encode_pair, 2)


class OurLoop:
    """What dpo.py does in one process, through the same functions."""

    def __init__(self, config, folder, documents):
        self.config, self.shape, self.documents = config, read_config(folder), documents
        self.device = torch.device("cpu")
        with torch.device("meta"):
            self.model = Llama(self.shape)
        shard(self.model, self.device, torch.float32)
        self.optimizer = make_optimizer(self.model, config)
        load_hf(self.model, folder)
        facts = {name: getattr(config, name) for name in ("max_seq_len", "micro_tokens")}
        run = dpo.DPOConfig(model=folder, out=folder, dtype="float32", **facts)
        weights = weights_key(folder)
        self.references = reference_logps(self.model, documents, run, weights, self.device)

    def update(self, pairs):
        """One update on `pairs`: the loss."""
        lengths = self.documents.record_lengths[pairs]
        sums = torch.zeros(len(dpo.METRICS), dtype=torch.float64)
        for row in plan_rows(lengths, 1, self.config.micro_tokens, self.shape.hidden_size)[0]:
            logps = answer_logps(self.model, self.documents, pairs[row], self.device)  # (n, 2)
            reference = self.references[pairs[row]].to(logps)
            loss, *rewards = dpo.dpo_loss(*logps.T, *reference.T, self.config.beta)
            (loss.sum() * (1 / len(pairs))).backward()
            sums += dpo.metric_sums(loss, *rewards, logps)
        clip_gradients(self.model, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (sums[0] / len(pairs)).item()


class TheirLoop:
    """Plain transformers: `rows` pairs in a padded batch, log-softmax of all its logits."""

    def __init__(self, config, folder, documents, rows, references):
        import transformers

        self.config, self.documents, self.rows = config, documents, rows
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.train()
        self.optimizer = make_optimizer(self.model, config)
        self.references = references.T.float()  # (2, n), ours: that they are theirs, ln 2 shows

    def logps(self, pairs):
        """Summed log-probabilities (2, n) of the chosen and the rejected answers."""
        batch = pad([self.documents[2 * i + side] for side in (0, 1) for i in pairs])
        labels = batch.pop("labels")[:, 1:]
        logits = self.model(**batch, use_cache=False).logits[:, :-1]
        trained = labels != -100
        logps = logits.log_softmax(-1).gather(2, labels.where(trained, 0)[..., None])[..., 0]
        return (logps * trained).sum(1).view(2, -1)

    def update(self, pairs):
        """One update on `pairs`: the loss."""
        total = 0.0
        for i in range(0, len(pairs), self.rows):
            batch = pairs[i : i + self.rows]
            chosen, rejected = self.config.beta * (self.logps(batch) - self.references[:, batch])
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).sum() / len(pairs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def measure(config, documents, loops, trl_folder):
    """One `Update` after another: each loop does it in turn, TRL's between them if a folder."""
    n = len(documents) // 2
    total = config.epochs * (n // config.batch_size)
    order = [update_members(n, config.batch_size, config.seed, k)[1] for k in range(total)]
    updates = []

    def others():
        pairs = order[len(updates)]
        updates.append(take_turns(loops, len(updates), pairs, pairs))

    if not trl_folder:
        for _ in range(total):
            others()
        return updates

    import transformers

    class Interleave(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = clocks()

        def on_step_end(self, *_, **__):
            seconds = (clocks() - self.started).tolist()
            batches = trainer.batches[-config.batch_size // 4 :]
            others()
            updates[-1].seconds["TRL, 4"], updates[-1].cpu_seconds["TRL, 4"] = seconds
            updates[-1].losses["TRL, 4"] = statistics.fmean(batch["loss"] for batch in batches)

    trainer = trl_trainer(config, trl_folder, documents, np.concatenate(order).tolist())
    trainer.add_callback(Interleave())
    trainer.train()
    return updates


# ---- Figures


def loop_flops(name, shape, lengths, trained):
    """FLOPs of an update of pairs whose chosen, rejected, chosen, … are of these lengths."""
    head = 2 * shape.vocab_size * shape.hidden_size  # of one product, per token
    if name == "ours":  # logits, and once more in backward, where the loss's gradient is known
        return model_flops(shape, lengths, trained) + head * int(trained)
    rows = 2 * int(name.split()[-1])
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    positions = sum(len(batch) * int(max(batch)) for batch in batches)
    # TRL makes the logits twice as we do, but on CPU at every position.
    return padded_flops(shape, lengths, rows) + name.startswith("TRL") * head * positions


def summarise(documents, shape, updates):
    """The figures of all loops, and the tokens that they are of."""

    def of(values, pairs):  # chosen, rejected, chosen, …
        return values[np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()]

    def flops(name, pairs):
        trained = of(documents.trained_counts, pairs).sum()
        return loop_flops(name, shape, of(documents.lengths, pairs), trained)

    everything = np.concatenate([update.members for update in updates])
    return {
        "pairs": len(documents) // 2,
        "tokens": int(of(documents.lengths, everything).sum()),
        "trained_tokens": int(of(documents.trained_counts, everything).sum()),
        **figures(updates, flops, "pairs", len),
    }
