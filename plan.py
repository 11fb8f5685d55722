"""Will it fit, how fast, how long: a run of sft.py and dpo.py computed before any GPU is paid for.

    python plan.py --model 70b --gpus 64 --gpu h100              Tulu 2, both stages
    python plan.py --model DIR --data FILE --gpus 8 --gpu a100   your own data

Nothing is loaded and no GPU is needed. Without --data, SFT on the Tulu V2 mixture and DPO on
UltraFeedback at the paper's settings. Exit status 1 where it does not fit, with the least change
that would. How it is computed, and how far from what was measured: planning/.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoint.config import read_config
from model import LlamaConfig
from planning import updates
from planning.gpus import GPU, find_gpu
from planning.memory import Layout, check_layout
from planning.report import figures, table
from program.errors import InputError, reported
from program.files import written_aside
from program.flags import check_bounds, parse_args
from selection.cost import scoring_flops
from selection.influence import LessFlags, with_rank
from tokens import readers
from tokens.records import encode_conversation, encode_pair
from tokens.shapes import FIELDS, is_pair
from training.flags import DataFlags, LoRAFlags, OutputFlags, RunFlags
from training.held_out import open_documents

FORWARD = 0.4  # share of the peak that prune.py is taken to reach

# Layers, E, F, H, Hk, V and rope_theta: the table in model.py.
SIZES = {
    "7b": (32, 4096, 11008, 32, 32, 32000, 1e4),
    "13b": (40, 5120, 13824, 40, 40, 32000, 1e4),
    "34b": (48, 8192, 22016, 64, 8, 32000, 1e6),
    "70b": (80, 8192, 28672, 64, 8, 32000, 1e4),
}
STAGES = {  # the loops' defaults, which are the paper's settings
    "sft": {"epochs": 2, "batch_size": 128},
    "dpo": {"epochs": 3, "batch_size": 32},
}


@dataclass(frozen=True)
class Ignored:
    """Flags of the loops that change neither memory nor time.

    Taken, so that a command of theirs can be planned as it stands.
    """

    lr: float | None = None  # peak learning rate
    warmup_ratio: float | None = None  # share of all updates in which the rate rises from 0
    weight_decay: float | None = None  # of AdamW
    beta1: float | None = None  # of AdamW
    beta2: float | None = None  # of AdamW
    clip: float | None = None  # largest global norm of the gradients
    beta: float | None = None  # how strongly DPO's reference holds


@dataclass(frozen=True)
class PlanConfig(Ignored, RunFlags, DataFlags, OutputFlags, LoRAFlags):
    """What is planned."""

    model: str | None = None  # a Hugging Face folder, or one of 7b, 13b, 34b, 70b
    gpus: int = 1  # GPUs, all machines together
    gpu: str = "h100"  # its kind: h100, h200, b200, a100, a100-40, l40s, 4090, 3090, h100-pcie
    stage: str | None = None  # sft or dpo (default: both; with --data, what the data are)
    data: list[str] | None = None  # conversations or pairs (default: Tulu 2's, by their figures)
    tokenizer: str | None = None  # folder of it, for --data (default: --model)
    price: float | None = None  # of a GPU hour, in any currency
    out: str | None = None  # JSON file for the figures
    epochs: int | None = None  # passes over the data (default: SFT 2, DPO 3)
    batch_size: int | None = None  # conversations (pairs) in one update (default: SFT 128, DPO 32)
    max_seq_len: int = 8192  # tokens; a longer conversation is cut on the right
    micro_tokens: int = 16384  # most tokens in one forward pass of one rank
    seed: int = 42  # of the order of the data


def main(flags: dict) -> bool:
    """Plan, print, and return whether everything fits."""
    config = PlanConfig(**flags)
    check(config)
    gpu = find_gpu(config.gpu)
    model_config = read_model(config.model, config.quantize is not None)
    layout = Layout(
        ranks=config.gpus, replicas=config.replicas, dtype=config.dtype or "bfloat16",
        compile=config.compile is not False, lora_rank=config.lora_rank,
        lora_dropout=config.lora_dropout, quantize=config.quantize,
        recompute=config.recompute or 0,
    )  # fmt: skip
    check_layout(model_config, layout)
    records = []
    for stage, lengths in stages(config).items():
        schedule = {name: getattr(config, name) for name in ("micro_tokens", "max_steps", "seed")}
        schedule |= {n: getattr(config, n) or value for n, value in STAGES[stage].items()}
        records.append(
            figures(stage, model_config, layout, gpu, lengths, schedule, config.recompute)
        )
        print("\n".join(table(records[-1], config.price)) + "\n")
        if stage == "sft":
            print(choosing(model_config, gpu, lengths) + "\n")
    print("computed, not measured: planning/ says from what, results/README.md how far off")
    if config.out:
        write(config, records)
    return all(record["fits"] for record in records)


def choosing(model_config: LlamaConfig, gpu: GPU, lengths: updates.Lengths) -> str:
    """What prune.py takes for as many conversations, in a line."""
    flags = with_rank(LessFlags(), model_config)
    hours = [
        scoring_flops(model_config, method, lengths.tokens[:, 0], lengths.trained.sum(), flags)
        / (FORWARD * gpu.flops) / 3600
        for method in ("rds", "less")
    ]  # fmt: skip
    return "choosing among them first (prune.py): rds {:.1f} GPU hours, less {:.1f}".format(*hours)


def check(config: PlanConfig) -> None:
    """Raise `InputError` for a flag with a bad value."""
    given = {name: v for name, v in dataclasses.asdict(config).items() if v is not None}
    check_bounds(dataclasses.make_dataclass("Given", given)(**given))
    if config.model is None:
        raise InputError(f"--model is missing, expected a folder or one of {', '.join(SIZES)}")
    for name, allowed in (("stage", tuple(STAGES)), ("quantize", ("nf4",))):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise InputError(f"--{name} is {value}, expected {' or '.join(allowed)}")
    if config.quantize and not config.lora_rank:
        raise InputError("--quantize needs --lora-rank: quantised weights are not trained")
    if config.out and not Path(config.out).resolve().parent.is_dir():
        raise InputError(f"--out: {config.out}: no such folder")


def read_model(name: str, quantized: bool = False) -> LlamaConfig:
    """The `LlamaConfig` of a folder (`quantized`: in NF4, too), or of a size by its name."""
    if name.lower() not in SIZES or Path(name).is_dir():
        if not Path(name).is_dir():
            raise InputError(f"--model is {name}, expected a folder or one of {', '.join(SIZES)}")
        return read_config(name, quantized)
    layers, E, F, H, Hk, V, theta = SIZES[name.lower()]
    return LlamaConfig(V, E, F, layers, H, Hk, E // H, 1e-5, theta, False)


def stages(config: PlanConfig) -> dict[str, updates.Lengths]:
    """`{stage: Lengths}` of what is planned."""
    if not config.data:
        known = {"sft": updates.mixture, "dpo": updates.ultrafeedback}
        wanted = [config.stage] if config.stage else known
        found = {stage: updates.cut(known[stage](), config.max_seq_len) for stage in wanted}
        for lengths in found.values():
            updates.check_rows(lengths, config.micro_tokens)
        return {
            stage: updates.part(lengths, config.eval_share, config.seed)
            for stage, lengths in found.items()
        }
    folder = config.tokenizer or config.model
    if not Path(folder).is_dir():
        raise InputError(
            f"--data needs a tokenizer, --model is {config.model}: give a folder, or --tokenizer"
        )
    stage = config.stage
    if stage is None:
        first = next(readers.records(readers.data_files(config.data)[0], FIELDS), (0, {}))
        stage = "dpo" if is_pair(first[1]) else "sft"
    encode, per_record = (encode_pair, 2) if stage == "dpo" else (encode_conversation, 1)
    # Where the data's folder cannot be written, the cache lives as long as this command.
    with tempfile.TemporaryDirectory() as temporary:
        trained = dataclasses.replace(config, model=folder, eval_data=None)
        documents, _, _ = open_documents(trained, encode, Path(temporary), per_record)
        name = ", ".join(Path(path).name for path in config.data)
        sizes = documents.lengths, documents.trained_counts, documents.shared
        return {stage: updates.Lengths(name, *sizes)}


def write(config: PlanConfig, records: list[dict]) -> None:
    """The JSON file: the figures of the first stage, and under `stages` those of each."""
    record = records[0] | {"stages": {record["stage"]: record for record in records}}
    record |= {"fits": all(record["fits"] for record in records)}
    record["flags"] = {n: v for n, v in dataclasses.asdict(config).items() if v is not None}
    with written_aside(config.out) as file:
        file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with reported():
        sys.exit(0 if main(parse_args(PlanConfig)) else 1)
