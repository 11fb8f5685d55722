"""Training speed of sft.py's loop beside a plain transformers loop, one update of each in turn:

    python bench.py sft --data FILE --tokenizer DIR

Same initial weights, conversations, order, fused AdamW, clipping and threads; the losses must agree
update by update. The transformers loop is the usual one: batches of 4 (or 16) conversations padded
to their longest, labels of -100 where nothing is trained, gradients accumulated over the update and
divided by its trained tokens. Beside them the matrix products of our loop and nothing else: what
any loop of this arithmetic must take. CPU time is shown too, for machines that do other work.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import write
from checkpoint import load_hf
from data import Documents, encode_conversation, pack_row, plan_rows, update_members
from errors import InputError
from kernels.cross_entropy import CPU_WORKSPACE
from model import Llama, LlamaConfig
from parallel import shard, start
from training import clip_gradients, learning_rate, make_optimizer, model_flops, parse_args

# The shapes of the model; the tiny one is for tests.
REAL = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688, "vocab_size": 32000}
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 88, "vocab_size": 400}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PADDED = (4, 16)  # conversations in one padded batch of the transformers loops
FP32_ROUNDING = 1e-5  # relative: sums of thousands of terms in another order, some updates on


@dataclass(frozen=True)
class SFTBenchConfig:
    """Flags of `python bench.py sft`."""

    data: str | None = None  # conversations (default: code_alpaca_gsm8k.jsonl of $TULU_DATA)
    tokenizer: str | None = None  # folder of a tokenizer.model (default: Llama 2's of $TULU_DATA)
    conversations: int = 480  # the first of the file
    batch_size: int = 32  # conversations in one update
    micro_tokens: int = 16384  # most tokens in one forward pass of our loop
    lr: float = 1e-3  # peak learning rate: high, so that wrong gradients would show in the losses
    warmup_ratio: float = 0.1  # share of all updates
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # largest global norm of the gradients
    seed: int = 42  # of the weights and of the order
    toy: bool = False  # a tiny model on made-up tokens, to rehearse
    out: str = "results/sft.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = SFTBenchConfig(**parse_args(SFTBenchConfig, arguments))
    _, _, device = start()
    if device.type != "cpu":
        raise InputError("bench.py sft compares on CPU, and found a GPU; see bench.py step")
    with tempfile.TemporaryDirectory() as folder:
        documents = made_up(config) if config.toy else first_documents(config, folder)
        make_model(config, folder)
        shape = LlamaConfig.from_folder(folder)
        loops = {"ours": OurLoop(config, folder), "its products": Products(config, shape)}
        for rows in PADDED:
            loops[f"transformers, {rows}"] = TheirLoop(config, folder, rows)
        updates = measure(config, documents, loops)
    figures = summarise(documents, shape, updates)
    show(config, figures)
    command = " ".join(["python bench.py sft", *arguments])
    model = {**(TOY if config.toy else REAL), **HEADS}
    write(config.out, command, device, dtype="float32", toy=config.toy, model=model, **figures)
    if not figures["largest_loss_difference"] < FP32_ROUNDING:
        raise AssertionError(f"losses differ by {figures['largest_loss_difference']:.1e} of them")


def first_documents(config, folder):
    """The first conversations of the file, tokenised by data.py, with `folder` for its cache."""
    shared = Path(os.environ.get("TULU_DATA", "../shared/data"))
    data = Path(config.data or shared / "sft/code_alpaca_gsm8k.jsonl")
    tokenizer = Path(config.tokenizer or shared / "llama2-tokenizer") / "tokenizer.model"
    for path, flag in ((data, "--data"), (tokenizer, "--tokenizer")):
        if not path.is_file():
            raise InputError(f"{flag}: {path}: no such file")
    shutil.copy(tokenizer, folder)
    first = Path(folder) / "data.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[: config.conversations]), encoding="utf-8")
    return Documents([first], folder, 8192, encode_conversation)


def made_up(config):
    """Random conversations, a third of each trained, in the form of `Documents`."""
    draw = np.random.default_rng(config.seed)
    lengths = draw.integers(8, 40, config.conversations)
    return [(draw.integers(3, TOY["vocab_size"], n), np.arange(n) >= n - n // 3) for n in lengths]


def make_model(config, folder):
    """A Hugging Face folder of random weights, from which every loop starts."""
    import transformers

    torch.manual_seed(config.seed)
    shape = transformers.LlamaConfig(**(TOY if config.toy else REAL), **HEADS)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)


class OurLoop:
    """What sft.py does in one process, through the same functions."""

    def __init__(self, config, folder):
        self.config, self.shape = config, LlamaConfig.from_folder(folder)
        with torch.device("meta"):
            self.model = Llama(self.shape)
        shard(self.model, torch.device("cpu"), torch.float32)
        self.optimizer = make_optimizer(self.model, config)
        load_hf(self.model, folder)

    def update(self, documents, lr):
        """One update on `documents`: the loss."""
        lengths = np.array([len(ids) for ids, _ in documents])
        trained = sum(np.count_nonzero(mask) for _, mask in documents)
        nll_sum = torch.zeros((), dtype=torch.float64)
        for row in plan_rows(lengths, 1, self.config.micro_tokens, self.shape.hidden_size)[0]:
            arrays = pack_row([documents[i] for i in row])
            batch = {name: torch.from_numpy(a) for name, a in arrays.items()}
            nll = self.model(**batch, uniform_gradient=True)  # (N,)
            (nll.sum() * (1 / trained)).backward()
            nll_sum += nll.detach().sum()
        clip_gradients(self.model, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (nll_sum / trained).item()


class TheirLoop:
    """Plain transformers: `rows` conversations in a padded batch, LlamaForCausalLM's own loss."""

    def __init__(self, config, folder, rows):
        import transformers

        self.config, self.rows = config, rows
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.train()
        self.optimizer = make_optimizer(self.model, config)

    def update(self, documents, lr):
        """One update on `documents`: the loss."""
        trained = sum(np.count_nonzero(mask) for _, mask in documents)
        total = 0.0
        for i in range(0, len(documents), self.rows):
            batch = pad(documents[i : i + self.rows])
            # transformers' loss is then the sum over the batch divided by that number.
            out = self.model(**batch, num_items_in_batch=int(trained), use_cache=False)
            out.loss.backward()
            total += out.loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def pad(documents):
    """input_ids, attention_mask and labels (rows, longest) of some conversations."""
    shape = len(documents), max(len(ids) for ids, _ in documents)
    input_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100)
    for row, (ids, trained) in enumerate(documents):
        n = len(ids)
        input_ids[row, :n], mask[row, :n] = ids, 1
        labels[row, :n] = np.where(trained, ids, -100)
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Products:
    """The matrix products of `OurLoop`'s updates, with the same sizes and nothing around them."""

    def __init__(self, config, shape):
        E, F, V = shape.hidden_size, shape.intermediate_size, shape.vocab_size
        q, kv = (
            heads * shape.head_dim
            for heads in (shape.num_attention_heads, shape.num_key_value_heads)
        )
        self.layers = [(E, q), (E, kv), (E, kv), (q, E), (E, F), (E, F), (F, E)]
        self.layers *= shape.num_hidden_layers
        self.config, self.hidden_size, self.head = config, E, (E, V)
        self.head_rows = max(1, CPU_WORKSPACE // (4 * V))
        rows = {width: config.micro_tokens for width in (E, q, kv, F)} | {V: self.head_rows}
        self.inputs = {width: torch.randn(n, width) for width, n in rows.items()}
        self.outputs = {width: torch.empty(n, width) for width, n in rows.items()}
        weights = {*self.layers, self.head}
        self.weights = {(n_in, n_out): torch.randn(n_out, n_in) for n_in, n_out in weights}
        self.gradients = {key: torch.empty_like(weight) for key, weight in self.weights.items()}

    def update(self, documents, lr):
        """The products of one update."""
        lengths = [len(ids) for ids, _ in documents]
        for row in plan_rows(lengths, 1, self.config.micro_tokens, self.hidden_size)[0]:
            for layer in self.layers:
                self.products(sum(lengths[i] for i in row), *layer)
            trained = sum(np.count_nonzero(documents[i][1]) for i in row)
            for i in range(0, trained, self.head_rows):
                self.products(min(self.head_rows, trained - i), *self.head)

    def products(self, rows, n_in, n_out):
        """Output, gradient of the input and gradient of the weight of a linear layer."""
        x, dy, weight = (
            self.inputs[n_in][:rows],
            self.inputs[n_out][:rows],
            self.weights[n_in, n_out],
        )
        torch.mm(x, weight.T, out=self.outputs[n_out][:rows])
        torch.mm(dy, weight, out=self.outputs[n_in][:rows])
        torch.mm(dy.T, x, out=self.gradients[n_in, n_out])


# The last three by name of the loop; CPU seconds are those of all threads.
Update = namedtuple("Update", "members seconds cpu_seconds losses")


def measure(config, documents, loops):
    """One `Update` after another: each loop does it in turn, and another one begins each time."""
    total, updates = len(documents) // config.batch_size, []
    names = list(loops)
    for step in range(total):
        _, members = update_members(len(documents), config.batch_size, config.seed, step)
        chosen = [documents[i] for i in members]
        lr = learning_rate(step, total, config.lr, config.warmup_ratio)
        update = Update(members, {}, {}, {})
        for name in names[step % len(names) :] + names[: step % len(names)]:
            started, cpu_started = time.perf_counter(), time.process_time()
            update.losses[name] = loops[name].update(chosen, lr)
            update.seconds[name] = time.perf_counter() - started
            update.cpu_seconds[name] = time.process_time() - cpu_started
        updates.append(update)
    return updates


# ---- Figures


def padded_flops(shape, lengths, rows):
    """FLOPs of forward and backward over padded batches, as transformers does them.

    As `model_flops`, but of every position of the padded rectangle, the head at all of them, and
    attention over the whole square of a row: with a padding mask none of it is left out.
    """
    flops = 0
    for i in range(0, len(lengths), rows):
        batch = lengths[i : i + rows]
        n = int(max(batch))
        upper = 6 * n * n * shape.num_attention_heads * shape.head_dim
        flops += len(batch) * (model_flops(shape, [n], n) + shape.num_hidden_layers * upper)
    return flops


def loop_flops(name, shape, lengths, trained):
    """FLOPs that the loop of that name does in an update."""
    if name.startswith("transformers"):
        return padded_flops(shape, lengths, int(name.split()[-1]))
    attention = 6 * sum(n * n for n in lengths) * shape.num_attention_heads * shape.head_dim
    without = 0 if name == "ours" else shape.num_hidden_layers * attention
    return model_flops(shape, lengths, trained) - without


def summarise(documents, shape, updates):
    """The figures: rates are over all updates but the first, which warms up; ratios are medians."""
    timed = updates[1:] or updates
    lengths = [[len(documents[i][0]) for i in update.members] for update in timed]
    trained = [sum(np.count_nonzero(documents[i][1]) for i in u.members) for u in timed]
    loops = {}
    for name in updates[0].seconds:
        seconds = sum(update.seconds[name] for update in timed)
        work = zip(lengths, trained, strict=True)
        flops = sum(loop_flops(name, shape, ns, n) for ns, n in work)
        loops[name] = {
            "trained_tokens_per_second": sum(trained) / seconds,
            "updates_per_second": len(timed) / seconds,
            "gflop_per_update": flops / len(timed) / 1e9,
            "gflop_per_second": flops / seconds / 1e9,
            "time_to_ours": median_ratio([u.seconds for u in timed], name),
            "cpu_time_to_ours": median_ratio([u.cpu_seconds for u in timed], name),
            "seconds": [round(update.seconds[name], 4) for update in updates],
            "cpu_seconds": [round(update.cpu_seconds[name], 4) for update in updates],
            "losses": [update.losses[name] for update in updates],
        }
    theirs = [name for name in loops if name.startswith("transformers")]
    better = min(theirs, key=lambda name: loops[name]["time_to_ours"])
    pairs = [(u.losses[name], u.losses["ours"]) for u in updates for name in theirs]
    return {
        "updates": len(updates),
        "tokens": sum(map(sum, lengths)),
        "trained_tokens": int(sum(trained)),
        "better": better,
        "speed_up": loops[better]["time_to_ours"],
        "cpu_speed_up": min(loops[name]["cpu_time_to_ours"] for name in theirs),
        "arithmetic": loops[better]["gflop_per_update"] / loops["ours"]["gflop_per_update"],
        "largest_loss_difference": max(abs(a - b) / b for a, b in pairs),
        "loops": loops,
    }


def median_ratio(times, name):
    """Median over the updates of a loop's time to ours."""
    return statistics.median(update[name] / update["ours"] for update in times)


def show(config, figures):
    """Print the table and what explains it."""
    columns = ("trained/s", "updates/s", "GFLOP", "GFLOP/s", "time", "CPU time")
    print(f"{figures['updates']} updates of {config.batch_size}".ljust(42), end="")
    print("".join(f"{column:>10}" for column in columns))
    for name, f in figures["loops"].items():
        name = name.replace("transformers, ", "transformers, padded to the longest of ")
        print(
            f"{name:42}{f['trained_tokens_per_second']:10,.0f}{f['updates_per_second']:10.3f}"
            f"{f['gflop_per_update']:10,.0f}{f['gflop_per_second']:10.1f}"
            f"{f['time_to_ours']:10.2f}{f['cpu_time_to_ours']:10.2f}"
        )
    speed_up, arithmetic = figures["speed_up"], figures["arithmetic"]
    products, losses = (figures["loops"][name] for name in ("its products", "ours"))
    losses = losses["losses"]
    print(
        f"{speed_up:.2f} times the better one ({figures['cpu_speed_up']:.2f} by CPU time): it does "
        f"{arithmetic:.2f} times our arithmetic, {np.log(arithmetic) / np.log(speed_up):.0%} of "
        f"that factor's logarithm.\n"
        f"Our matrix products alone take {products['time_to_ours']:.0%} of our time "
        f"({products['cpu_time_to_ours']:.0%} of CPU time).\n"
        f"Losses from {losses[0]:.4f} to {losses[-1]:.4f}, at most "
        f"{figures['largest_loss_difference']:.1e} of them apart."
    )
