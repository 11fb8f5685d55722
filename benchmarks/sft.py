"""Training speed of sft.py beside a plain transformers loop, one update of each in turn:

    python bench.py sft --data FILE --tokenizer DIR

Default data: sft/code_alpaca_gsm8k.jsonl. Same initial weights, conversations, order, rates, fused
AdamW, clipping and threads; the losses must agree update by update. The transformers loop is the
usual one: batches of 4 (or 16) conversations padded to the longest, labels of -100 where nothing is
trained, gradients accumulated over the update and divided by its trained tokens. Beside them the
matrix products of our loop and nothing else: any loop of this arithmetic takes at least as long.
CPU time is shown too, for machines that do other work.
"""

import functools
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

import sft
from benchmarks import inputs, loops
from benchmarks.measure import write
from checkpoint.config import read_config
from data import plan_rows
from kernels.cross_entropy import CPU_WORKSPACE
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start
from tokens.records import encode_conversation
from training.update import model_flops

PADDED = (4, 16)  # conversations in one padded batch of the transformers loops
FP32_ROUNDING = 1e-5  # relative: sums of thousands of terms in another order, some updates on


@dataclass(frozen=True)
class SFTBenchConfig(inputs.InputFlags):
    """Flags of `python bench.py sft`."""

    conversations: int = 480  # the first of the file
    batch_size: int = 32  # conversations in one update
    micro_tokens: int = 16384  # most tokens in one forward pass of our loop
    lr: float = 1e-3  # peak learning rate: high, so that wrong gradients would show in the losses
    warmup_ratio: float = 0.1  # share of all updates
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/sft.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = SFTBenchConfig(**parse_args(SFTBenchConfig, arguments))
    _, _, device = start()
    if device.type != "cpu":
        raise InputError("bench.py sft compares on CPU, and found a GPU; see bench.py step")
    default, n = "sft/code_alpaca_gsm8k.jsonl", config.conversations
    with tempfile.TemporaryDirectory() as folder:
        documents = inputs.first_documents(config, default, n, folder, 8192, encode_conversation)
        model = inputs.make_model(config, folder)
        shape = read_config(folder)
        flags = {name: getattr(config, name) for name in ("batch_size", "micro_tokens", "seed")}
        flags |= {"lr": config.lr, "warmup_ratio": config.warmup_ratio, "epochs": 1}
        flags |= {"model": folder, "data": [f"{folder}/data.jsonl"], "out": f"{folder}/out"}
        others = {"its products": Products(shape, documents, config.micro_tokens)}
        for rows in PADDED:
            loss = functools.partial(conversations_loss, documents)
            others[f"transformers, {rows}"] = loops.PaddedLoop(sft.SFTConfig(**flags), rows, loss)
        updates = loops.run_in_turns(sft, flags, others)
    flops = functools.partial(loop_flops, shape)
    figures = loops.figures(updates, documents, flops, "trained_tokens", warm_up=1)
    loops.show(figures, "trained_tokens")
    products = figures["loops"]["its products"]
    print(
        f"Our matrix products alone take {products['time_to_ours']:.0%} of our time "
        f"({products['cpu_time_to_ours']:.0%} of CPU time)."
    )
    write("sft", config, arguments, device, dtype="float32", model=model, **figures)
    loops.check_losses(figures, FP32_ROUNDING)


def conversations_loss(documents, model, batch, members):
    """LlamaForCausalLM's own loss of a padded batch, as its share of the update's."""
    # It divides the sum over the batch by the number that is given.
    trained = int(documents.trained_counts[members].sum())
    padded = loops.pad(documents.sequences(batch))
    return model(**padded, num_items_in_batch=trained, use_cache=False).loss


class Products:
    """The matrix products of sft.py's updates, with the same sizes and nothing around them."""

    def __init__(self, shape, documents, micro_tokens):
        E, F, V = shape.hidden_size, shape.intermediate_size, shape.vocab_size
        q, kv = (
            heads * shape.head_dim
            for heads in (shape.num_attention_heads, shape.num_key_value_heads)
        )
        self.layers = [(E, q), (E, kv), (E, kv), (q, E), (E, F), (E, F), (F, E)]
        self.layers *= shape.num_hidden_layers
        self.documents, self.micro_tokens = documents, micro_tokens
        self.hidden_size, self.head = E, (E, V)
        self.head_rows = max(1, CPU_WORKSPACE // (4 * V))
        rows = {width: micro_tokens for width in (E, q, kv, F)} | {V: self.head_rows}
        self.inputs = {width: torch.randn(n, width) for width, n in rows.items()}
        self.outputs = {width: torch.empty(n, width) for width, n in rows.items()}
        weights = {*self.layers, self.head}
        self.weights = {(n_in, n_out): torch.randn(n_out, n_in) for n_in, n_out in weights}
        self.gradients = {key: torch.empty_like(weight) for key, weight in self.weights.items()}

    def update(self, members, lr):
        """The products of one update."""
        lengths = self.documents.lengths[members].sum(1)
        trained_counts = self.documents.trained_counts[members].sum(1)
        for row in plan_rows(lengths, 1, self.micro_tokens, self.hidden_size)[0]:
            for layer in self.layers:
                self.products(lengths[row].sum(), *layer)
            trained = trained_counts[row].sum()
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


def loop_flops(shape, name, lengths, trained, shared):
    """FLOPs of the loop of that name in an update of documents of these lengths."""
    if name.startswith("transformers"):
        return loops.padded_flops(shape, lengths, int(name.split()[-1]))
    flops = model_flops(shape, lengths, trained, shared)
    if name == "its products":  # without attention's
        squares = int((np.asarray(lengths, np.int64) ** 2).sum())
        width = shape.num_attention_heads * shape.head_dim
        flops -= shape.num_hidden_layers * 6 * squares * width
    return flops
