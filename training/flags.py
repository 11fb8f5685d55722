"""The flags that sft.py and dpo.py share: how a run is carried out, not what an update is.

The loops' own dataclasses inherit them, and --help shows each class here as a group.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoRAFlags:
    """LoRA and QLoRA: small adapters are trained, the model's own weights stay.

    Tulu 2's QLoRA models: --lora-rank 64 --quantize nf4 --lr 1e-4 --epochs 5 --max-seq-len 4096.
    """

    lora_rank: int = 0  # of the adapters of all projections of the blocks (0: train all weights)
    lora_alpha: float = 16.0  # what an adapter adds is scaled by alpha / rank
    lora_dropout: float = 0.1  # share of an adapter's inputs that is dropped in training
    quantize: str | None = None  # nf4: the projections' own weights in 4 bits


@dataclass(frozen=True)
class RunFlags:
    """How the run is carried out."""

    max_steps: int = 0  # stop after so many updates of the full schedule (0: all)
    save_every: int = 0  # updates between resumable checkpoints (0: only when stopped by a signal)
    keep: int = 2  # resumable checkpoints that stay
    keep_checkpoints: bool = False  # a finished run keeps them, too
    dtype: str | None = None  # bfloat16 or float32, to compute in (default: bfloat16 on a GPU)
    recompute: int | None = None  # last N blocks run again in backward (default: what memory asks)
    replicas: int = 1  # groups of ranks, each of which holds the whole model once (HSDP)
    compile: bool | None = None  # torch.compile per block (default: on a GPU)


@dataclass(frozen=True)
class DataFlags:
    """What of the data is trained, and what is held out to measure the loss on."""

    too_long: str = "cut"  # what becomes of a record over --max-seq-len: cut, drop or error
    eval_data: list[str] | None = None  # held-out data, of the same kinds as --data
    eval_share: float = 0.0  # or this share of --data, drawn by --seed alone and not trained on
    eval_every: int = 0  # updates between two measurements (0: after each epoch); one at the end


@dataclass(frozen=True)
class OutputFlags:
    """What is written on the way, beside metrics.jsonl."""

    export_every: str | None = None  # updates, or epoch: between two models in OUT/step-…/
    keep_exports: int = 0  # how many of them stay, the newest (0: all)
    export_merged: bool = False  # with --lora-rank: merged models instead of adapters alone
    tensorboard: bool = False  # the records of metrics.jsonl to OUT/tensorboard, too
    wandb: bool = False  # and to Weights & Biases, where its own settings say


# The folders of the demo's results, which it removes whenever it starts.
DEMO = {"sft": "runs/demo/sft", "dpo": "runs/demo/dpo"}

# What the error says where a GPU's memory is out.
LESS_MEMORY = "A larger --recompute, a smaller --micro-tokens or more GPUs take less"
