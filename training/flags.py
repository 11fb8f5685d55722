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
    recompute: bool | None = None  # activations again in backward, per block (default: on a GPU)
    compile: bool | None = None  # torch.compile per block (default: on a GPU)
