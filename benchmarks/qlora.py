"""QLoRA's training speed beside full training's and beside transformers with PEFT, in turn:

    python bench.py qlora --data FILE --tokenizer DIR

Default data: sft/code_alpaca_gsm8k.jsonl. All loops start from the same weights and do the same
updates, in fp32, without dropout. PEFT's adapters start as ours, on the weights of the same NF4:
decoded once and kept in fp32, and, where bitsandbytes is installed, decoded by it at each use. So
the losses must agree update by update. Full training runs our rows through our model. At the end
each loop does two updates alone, in a process of its own, for its peak memory. Needs the packages
transformers and peft.
"""

import dataclasses
import functools
import importlib.util
import multiprocessing
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import sft
from adapters.lora import put_in
from benchmarks import inputs, loops
from benchmarks.measure import write
from benchmarks.sft import FP32_ROUNDING, conversations_loss
from checkpoint.config import read_config
from checkpoint.weights import load_hf
from data import pack_row, plan_rows, update_members
from model import Llama
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start
from tokens.documents import Documents
from tokens.records import encode_conversation
from training.flags import RunFlags
from training.parallel import shard
from training.update import clip_gradients, make_optimizer, model_flops

PADDED = 4  # conversations in one padded batch of the transformers loops
SMALL = inputs.shape(256, 704, 4, 4, 2)  # an update takes seconds on 2 CPU cores; multiples of 64
TOY = inputs.shape(64, 128, 2, 2, 1)


@dataclass(frozen=True)
class QLoRABenchConfig(inputs.InputFlags):
    """Flags of `python bench.py qlora`."""

    conversations: int = 320  # the first of the file
    batch_size: int = 32  # conversations in one update
    micro_tokens: int = 16384  # most tokens in one forward pass of our loops
    lora_rank: int = 16  # of the adapters
    lr: float = 1e-3  # peak learning rate: high, so that wrong gradients would show in the losses
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/qlora.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = QLoRABenchConfig(**parse_args(QLoRABenchConfig, arguments))
    _, _, device = start()
    if device.type != "cpu":
        raise InputError("bench.py qlora compares on CPU, and found a GPU; see bench.py step")
    default, n = "sft/code_alpaca_gsm8k.jsonl", config.conversations
    with tempfile.TemporaryDirectory() as folder:
        documents = inputs.first_documents(config, default, n, folder, 8192, encode_conversation)
        model = inputs.make_model(config, folder, TOY if config.toy else SMALL)
        flags = {name: getattr(config, name) for name in ("batch_size", "micro_tokens", "seed")}
        flags |= {"lr": config.lr, "epochs": 1, "lora_rank": config.lora_rank, "quantize": "nf4"}
        flags |= {"lora_dropout": 0.0, "warmup_ratio": 0.1}
        flags |= {"model": folder, "data": [f"{folder}/data.jsonl"], "out": f"{folder}/out"}
        names = [name for name in LOOPS if not name.endswith(f"bitsandbytes, {PADDED}")]
        names = list(LOOPS) if importlib.util.find_spec("bitsandbytes") else names
        others = {name: LOOPS[name](sft.SFTConfig(**flags), documents) for name in names}
        updates = loops.run_in_turns(sft, flags, others)
        shape = read_config(folder)
        peaks = {name: peak_of(name, flags) for name in ("nothing", "ours", *names)}
    flops = functools.partial(loop_flops, shape, config.lora_rank)
    figures = loops.figures(updates, documents, flops, "trained_tokens", warm_up=1)
    loops.show(figures, "trained_tokens")
    mib = {name: round(peak - peaks["nothing"]) for name, peak in peaks.items()}
    print("Peak memory of each alone, MiB above a process that has imported the packages:")
    print(*(f"{name:42}{peak:10,}" for name, peak in mib.items()), sep="\n")
    facts = {"dtype": "float32", "model": model, "peak_mib": mib}
    write("qlora", config, arguments, device, **facts, **figures)
    loops.check_losses(figures, FP32_ROUNDING)


class FullTraining:
    """All weights, in fp32: the rows, the model and the update of sft.py."""

    def __init__(self, config, documents):
        self.config, self.documents = config, documents
        with torch.device("meta"):
            self.model = Llama(read_config(config.model))
        shard(self.model, RunFlags(dtype="float32"), torch.device("cpu"))
        load_hf(self.model, config.model)
        self.optimizer = make_optimizer(self.model, config)

    def update(self, members, lr):
        """One update on the records `members`: the loss."""
        lengths = self.documents.lengths[members][:, 0]
        trained, total = self.documents.trained_counts[members].sum(), 0.0
        hidden_size = self.model.config.hidden_size
        for row in plan_rows(lengths, 1, self.config.micro_tokens, hidden_size)[0]:
            arrays = pack_row(self.documents.sequences(members[row]))
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            loss = self.model(**batch, uniform_gradient=True).sum() / trained
            loss.backward()
            total += loss.item()
        clip_gradients(self.model, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class PeftLoop(loops.PaddedLoop):
    """transformers' model with PEFT's adapters, on padded batches."""

    def __init__(self, config, documents, in_4_bits=False):
        import peft

        super().__init__(config, PADDED, functools.partial(conversations_loss, documents))
        with torch.device("meta"):
            ours = Llama(read_config(config.model))
        put_in(ours, dataclasses.replace(config, dtype="float32"))
        ours.to_empty(device="cpu")
        load_hf(ours, config.model)
        adapted = {name: m for name, m in ours.named_modules() if hasattr(m, "lora_A")}
        if in_4_bits:
            self.model = quantized_by_bitsandbytes(config.model, adapted)
        else:
            for name, module in adapted.items():
                self.model.get_parameter(f"{name}.weight").data.copy_(module.merged_rows(0))
        targets = sorted({name.rpartition(".")[2] for name in adapted})
        self.model = peft.get_peft_model(
            self.model,
            peft.LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets
            ),
        )
        for name, module in adapted.items():
            theirs = self.model.get_submodule(f"base_model.model.{name}")
            theirs.lora_A["default"].weight.data.copy_(module.lora_A.weight)
        self.model.train()
        self.optimizer = make_optimizer(self.model, config)


def quantized_by_bitsandbytes(folder, adapted):
    """transformers' model in NF4, its scales' codes ours: bitsandbytes' CPU misses some by one."""
    import transformers

    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    for name, module in adapted.items():
        model.get_parameter(f"{name}.weight").quant_state.absmax = module.absmax
    return model


LOOPS = {
    "full training": FullTraining,
    f"transformers + PEFT, {PADDED}": PeftLoop,
    f"transformers + PEFT + bitsandbytes, {PADDED}": functools.partial(PeftLoop, in_4_bits=True),
}


def peak_of(name, flags):
    """Peak memory in MiB of two updates of a loop, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_peak, args=(name, flags, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def send_peak(name, flags, sender):
    """Do the updates and send the process's peak memory."""
    import peft  # noqa: F401, in every process alike
    import transformers  # noqa: F401

    start()
    documents = Documents(flags["data"], flags["model"], 8192, encode_conversation)
    if name == "ours":
        sft.main(flags | {"out": flags["out"] + "-alone", "max_steps": 2})
    elif name != "nothing":
        loop = LOOPS[name](sft.SFTConfig(**flags), documents)
        for step in range(2):
            _, members = update_members(len(documents), flags["batch_size"], flags["seed"], step)
            loop.update(members, flags["lr"])
    # Not getrusage: its peak may be the parent's.
    status = Path("/proc/self/status").read_text()
    sender.send(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def loop_flops(shape, lora_rank, name, lengths, trained, shared):
    """FLOPs of the loop of that name in an update of documents of these lengths."""
    if name.startswith("transformers"):
        return loops.padded_flops(shape, lengths, PADDED, lora_rank)
    rank = 0 if name == "full training" else lora_rank
    return model_flops(shape, lengths, trained, shared, rank)
