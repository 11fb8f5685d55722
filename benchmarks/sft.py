"""Training speed of sft.py's loop beside a plain transformers loop, one update of each in turn:

    python bench.py sft --data FILE --tokenizer DIR

Same initial weights, conversations, order, fused AdamW, clipping and threads; the losses must agree
update by update. The transformers loop is the usual one: batches of 4 (or 16) conversations padded
to their longest, labels of -100 where nothing is trained, gradients accumulated over the update and
divided by its trained tokens. Beside them the matrix products of our loop and nothing else: what
any loop of this arithmetic must take. CPU time is shown too, for machines that do other work.
"""

import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.loops import (
    HEADS,
    REAL,
    TOY,
    figures,
    first_documents,
    make_model,
    pad,
    padded_flops,
    show,
    take_turns,
)
from benchmarks.measure import write
from checkpoint.config import read_config
from checkpoint.weights import load_hf
from data import encode_conversation, pack_row, plan_rows, update_members
from kernels.cross_entropy import CPU_WORKSPACE
from model import Llama
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start
from training.parallel import shard
from training.update import clip_gradients, learning_rate, make_optimizer, model_flops

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
        documents = made_up(config) if config.toy else real(config, folder)
        make_model(config, folder)
        shape = read_config(folder)
        loops = {"ours": OurLoop(config, folder), "its products": Products(config, shape)}
        for rows in PADDED:
            loops[f"transformers, {rows}"] = TheirLoop(config, folder, rows)
        updates = measure(config, documents, loops)
    found = summarise(documents, shape, updates)
    show(found, "trained_tokens")
    products = found["loops"]["its products"]
    print(
        f"Our matrix products alone take {products['time_to_ours']:.0%} of our time "
        f"({products['cpu_time_to_ours']:.0%} of CPU time)."
    )
    command = " ".join(["python bench.py sft", *arguments])
    model = {**(TOY if config.toy else REAL), **HEADS}
    write(config.out, command, device, dtype="float32", toy=config.toy, model=model, **found)
    if not found["largest_loss_difference"] < FP32_ROUNDING:
        raise AssertionError(f"losses differ by {found['largest_loss_difference']:.1e} of them")


def real(config, folder):
    """The first conversations of the file."""
    default, n = "sft/code_alpaca_gsm8k.jsonl", config.conversations
    return first_documents(config, default, n, folder, 8192, encode_conversation)


def made_up(config):
    """Random conversations, a third of each trained, in the form of `Documents`."""
    draw = np.random.default_rng(config.seed)
    lengths = draw.integers(8, 40, config.conversations)
    return [(draw.integers(3, TOY["vocab_size"], n), np.arange(n) >= n - n // 3) for n in lengths]


class OurLoop:
    """What sft.py does in one process, through the same functions."""

    def __init__(self, config, folder):
        self.config, self.shape = config, read_config(folder)
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


def measure(config, documents, loops):
    """One `Update` after another."""
    total, updates = len(documents) // config.batch_size, []
    for step in range(total):
        _, members = update_members(len(documents), config.batch_size, config.seed, step)
        lr = learning_rate(step, total, config.lr, config.warmup_ratio)
        chosen = [documents[i] for i in members]
        updates.append(take_turns(loops, step, members, chosen, lr))
    return updates


# ---- Figures


def loop_flops(name, shape, lengths, trained):
    """FLOPs that the loop of that name does in an update."""
    if name.startswith("transformers"):
        return padded_flops(shape, lengths, int(name.split()[-1]))
    attention = 6 * sum(n * n for n in lengths) * shape.num_attention_heads * shape.head_dim
    without = 0 if name == "ours" else shape.num_hidden_layers * attention
    return model_flops(shape, lengths, trained) - without


def summarise(documents, shape, updates):
    """The figures of all loops, and the tokens that they are of."""

    def tokens(members):
        return [len(documents[i][0]) for i in members]

    def trained(members):
        return sum(int(np.count_nonzero(documents[i][1])) for i in members)

    def flops(name, members):
        return loop_flops(name, shape, tokens(members), trained(members))

    return {
        "tokens": sum(sum(tokens(update.members)) for update in updates),
        "trained_tokens": sum(trained(update.members) for update in updates),
        **figures(updates, flops, "trained_tokens", trained, warm_up=1),
    }
