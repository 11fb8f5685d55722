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

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import dpo
from benchmarks.measure import write
from benchmarks.sft import HEADS, REAL, TOY, Update, make_model, pad, padded_flops
from checkpoint import load_hf
from data import Documents, plan_rows, update_members
from errors import InputError
from logps import answer_logps, reference_logps, weights_key
from model import Llama, LlamaConfig
from parallel import shard, start
from schemas import encode_pair
from training import clip_gradients, make_optimizer, model_flops, parse_args

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
    """Measure, print the table, write the JSON file: its figures."""
    config = DPOBenchConfig(**parse_args(DPOBenchConfig, arguments))
    _, _, device = start()
    if device.type != "cpu":
        raise InputError("bench.py dpo compares on CPU, and found a GPU")
    with tempfile.TemporaryDirectory() as folder:
        documents = first_pairs(config, folder)
        make_model(config, folder)
        shape = LlamaConfig.from_folder(folder)
        ours = OurLoop(config, folder, documents)
        loops = {"ours": ours}
        for rows in PADDED:
            theirs = TheirLoop(config, folder, documents, rows, ours.references)
            loops[f"transformers, {rows}"] = theirs
        trl = bool(config.trl and find_spec("trl"))
        updates = measure(config, documents, loops, folder if trl else None)
    figures = summarise(documents, shape, updates)
    show(config, figures)
    if not trl:
        print("TRL took no part: not installed, or --no-trl.")
    command = " ".join(["python bench.py dpo", *arguments])
    model = {**(TOY if config.toy else REAL), **HEADS}
    write(config.out, command, device, dtype="float32", toy=config.toy, model=model, **figures)
    if not figures["largest_loss_difference"] < LOSS_TOLERANCE:
        raise AssertionError(f"losses differ by {figures['largest_loss_difference']:.1e}")
    return figures


def first_pairs(config, folder):
    """The first pairs of the file, tokenised by data.py, with `folder` for its cache."""
    shared = Path(os.environ.get("TULU_DATA", "../shared/data"))
    data = Path(config.data or shared / "prefs/alpaca_eval_tulu2_13b.jsonl")
    tokenizer = Path(config.tokenizer or shared / "llama2-tokenizer") / "tokenizer.model"
    for path, flag in ((data, "--data"), (tokenizer, "--tokenizer")):
        if not path.is_file():
            raise InputError(f"{flag}: {path}: no such file")
    shutil.copy(tokenizer, folder)
    first = Path(folder) / "data.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[: config.pairs]), encoding="utf-8")
    return Documents([first], folder, config.max_seq_len, encode_pair, per_record=2)


class OurLoop:
    """What dpo.py does in one process, through the same functions."""

    def __init__(self, config, folder, documents):
        self.config, self.shape, self.documents = config, LlamaConfig.from_folder(folder), documents
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


def trl_trainer(config, folder, documents, order, **settings):
    """TRL's DPOTrainer on the pairs of `order`, one after another, with our tokens and our AdamW.

    Its metrics of each batch, the loss among them, are in `batches`.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # of token ids, which it would make here

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **more):
            loss = super().compute_loss(*arguments, **more)
            metrics = {name: values[-1] for name, values in self._metrics["train"].items()}
            self.batches.append({"loss": loss.item(), **metrics})
            return loss

    rows = []
    for pair in order:
        (chosen, marks), (rejected, _) = documents[2 * pair], documents[2 * pair + 1]
        n = int(np.argmax(marks))  # the answer is all that is left of a document
        ids = {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
        rows.append({f"{name}_ids": np.asarray(part).tolist() for name, part in ids.items()})
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": config.batch_size // 4,
        "num_train_epochs": 1,
        "precompute_ref_log_probs": True,
        "max_length": config.max_seq_len,
        "beta": config.beta,
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "max_grad_norm": config.clip,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    names = {f"{name}_token": "<unk>" for name in ("pad", "eos", "unk")}
    trainer = Trainer(
        model=transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.DPOConfig(**(defaults | settings)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names),
    )
    trainer.batches = []
    return trainer


def measure(config, documents, loops, trl_folder):
    """One `Update` after another: each loop does it in turn, TRL's between them if a folder."""
    n = len(documents) // 2
    total = config.epochs * (n // config.batch_size)
    order = [update_members(n, config.batch_size, config.seed, k)[1] for k in range(total)]
    updates = []

    def others():
        pairs, names = order[len(updates)], list(loops)
        update = Update(pairs, {}, {}, {})
        first = len(updates) % len(names)
        for name in names[first:] + names[:first]:
            started = clocks()
            update.losses[name] = loops[name].update(pairs)
            update.seconds[name], update.cpu_seconds[name] = clocks() - started
        updates.append(update)

    if not trl_folder:
        for _ in range(total):
            others()
        return updates

    import transformers

    class Interleave(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = clocks()

        def on_step_end(self, *_, **__):
            seconds = clocks() - self.started
            batches = trainer.batches[-config.batch_size // 4 :]
            others()
            updates[-1].seconds["TRL, 4"], updates[-1].cpu_seconds["TRL, 4"] = seconds
            updates[-1].losses["TRL, 4"] = statistics.fmean(batch["loss"] for batch in batches)

    trainer = trl_trainer(config, trl_folder, documents, np.concatenate(order).tolist())
    trainer.add_callback(Interleave())
    trainer.train()
    return updates


def clocks():
    """Seconds, and CPU seconds of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


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
    """The figures: times are medians over the updates, ratios medians of each update's ratio."""
    members = [np.stack([2 * u.members, 2 * u.members + 1], 1).ravel() for u in updates]
    loops = {}
    for name in updates[0].seconds:
        seconds = statistics.median(update.seconds[name] for update in updates)
        flops = statistics.fmean(
            loop_flops(name, shape, documents.lengths[m], documents.trained_counts[m].sum())
            for m in members
        )
        loops[name] = {
            "pairs_per_second": len(updates[0].members) / seconds,
            "gflop_per_update": flops / 1e9,
            "gflop_per_second": flops / seconds / 1e9,
            "time_to_ours": statistics.median(u.seconds[name] / u.seconds["ours"] for u in updates),
            "cpu_time_to_ours": statistics.median(
                u.cpu_seconds[name] / u.cpu_seconds["ours"] for u in updates
            ),
            "seconds": [round(float(update.seconds[name]), 4) for update in updates],
            "cpu_seconds": [round(float(update.cpu_seconds[name]), 4) for update in updates],
            "losses": [update.losses[name] for update in updates],
        }
    theirs = [name for name in loops if name != "ours"]
    better = min(theirs, key=lambda name: loops[name]["time_to_ours"])
    differences = [abs(u.losses[name] - u.losses["ours"]) for u in updates for name in theirs]
    return {
        "pairs": len(documents) // 2,
        "updates": len(updates),
        "tokens": int(sum(documents.lengths[m].sum() for m in members)),
        "trained_tokens": int(sum(documents.trained_counts[m].sum() for m in members)),
        "better": better,
        "speed_up": loops[better]["time_to_ours"],
        "cpu_speed_up": min(loops[name]["cpu_time_to_ours"] for name in theirs),
        "arithmetic": loops[better]["gflop_per_update"] / loops["ours"]["gflop_per_update"],
        "largest_loss_difference": max(differences),
        "loops": loops,
    }


def show(config, figures):
    """Print the table and what explains it."""
    columns = ("pairs/s", "GFLOP", "GFLOP/s", "time", "CPU time", "losses")
    print(f"{figures['updates']} updates of {config.batch_size} pairs".ljust(42), end="")
    print("".join(f"{column:>10}" for column in columns))
    for name, f in figures["loops"].items():
        losses = " ".join(f"{loss:.5f}" for loss in f["losses"][:3])
        print(
            f"{name.replace(', ', ', pairs in a padded batch: '):42}{f['pairs_per_second']:10.2f}"
            f"{f['gflop_per_update']:10,.0f}{f['gflop_per_second']:10.1f}"
            f"{f['time_to_ours']:10.2f}{f['cpu_time_to_ours']:10.2f}    {losses}"
        )
    print(
        f"{figures['speed_up']:.2f} times {figures['better']} ({figures['cpu_speed_up']:.2f} by "
        f"CPU time), which does {figures['arithmetic']:.2f} times our arithmetic.\n"
        f"{figures['trained_tokens'] / figures['tokens']:.0%} of {figures['tokens']:,} tokens are "
        f"trained. Losses are at most {figures['largest_loss_difference']:.1e} apart."
    )
