"""LoRA on the seven projections of every block, beside frozen weights in 16 bits or in NF4.

Hu et al. 2021 (arXiv 2106.09685), section 4.1, and for NF4 Dettmers et al. 2023 (arXiv 2305.14314),
equation 5. For a frozen weight W (N, K) and trained A (R, K) and B (N, R):

    y = W x + (alpha / R) B A dropout(x)                                                        (1)

A starts uniform in ±1/√K (kaiming_uniform with a = √5, as in PEFT), B at zero: the model starts as
the base. Only A and B are trained, in fp32, and only they have gradients and moments. W, the
embedding, the norms and the head are in the type that the blocks compute in, or W in NF4: there is
no fp32 copy beside.

Names are PEFT's, less its prefix: `….q_proj.lora_A.weight`. adapters/dropout.py says what dropout
depends on; checkpoint/adapter_folder.py writes PEFT's format.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adapters.dropout import Dropout
from checkpoint.weights import local_rows
from kernels import nf4
from model import Llama, LlamaConfig
from program.errors import InputError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def put_in(model: Llama, config, names: Iterable[str] = PROJECTIONS) -> Dropout:
    """Freeze a model that is on the meta device, and put adapters into it, in place.

    config: flags `lora_rank` (0: the model stays as it is), `lora_alpha`, `lora_dropout`,
    `quantize`, `seed`, `dtype`. names: of the projections that get them. Returns the adapters'
    `Dropout`, to which the loop tells each update's number. Raises `InputError` for a flag that
    does not go with the model.
    """
    check_lora(model.config, config)
    dropout = Dropout(config.lora_dropout, config.seed)
    if config.lora_rank:
        model.to(getattr(torch, config.dtype)).requires_grad_(False)
        with torch.device("meta"):
            for number, (block, name) in enumerate(projections(model, names)):
                setattr(block, name, LoRALinear(getattr(block, name), number, dropout, config))
        dropout.listen(model.model)
    return dropout


def projections(
    model: Llama, names: Iterable[str] = PROJECTIONS
) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of every projection of the blocks that has one of the names."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            yield from ((parent, name) for name in names if hasattr(parent, name))


def narrowest(model_config: LlamaConfig) -> int:
    """The width of the model's narrowest projection: no rank is higher."""
    kv = model_config.num_key_value_heads * model_config.head_dim
    return min(model_config.hidden_size, model_config.intermediate_size, kv)


def check_lora(model_config: LlamaConfig, config) -> None:
    """Raise `InputError` for flags of LoRA that do not go together, or not with this model."""
    E, F = model_config.hidden_size, model_config.intermediate_size
    D, H = model_config.head_dim, model_config.num_attention_heads
    if config.quantize not in (None, "nf4"):
        raise InputError(f"--quantize is {config.quantize}, expected nf4")
    if config.quantize and not config.lora_rank:
        raise InputError(
            "--quantize nf4 without --lora-rank: quantised weights are not trained themselves, "
            "expected a --lora-rank from 1 up"
        )
    if config.lora_rank > narrowest(model_config):
        raise InputError(
            f"--lora-rank is {config.lora_rank}, expected at most {narrowest(model_config)}, the "
            "width of the model's narrowest projection"
        )
    widths = {"hidden_size": E, "heads · head_dim": H * D, "intermediate_size": F}
    for name, width in widths.items():
        if config.quantize and width % nf4.BLOCK:
            raise InputError(
                f"--quantize nf4: the model's {name} is {width}, expected a multiple of "
                f"{nf4.BLOCK}, the weights in a block"
            )


class LoRALinear(nn.Module):
    """(1), in place of an `nn.Linear`. With NF4, `weight` holds the codes (N, K / 2) uint8.

    The scales of NF4, 3 % of its bytes, are whole on every rank: FSDP2 shards rows of `weight`, and
    would cast scales to 16 bits.
    """

    def __init__(self, linear: nn.Linear, number: int, dropout: Dropout, config) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.alpha = config.lora_rank, config.lora_alpha
        self.scale = self.alpha / self.rank
        self.seed, self.number, self.dropout = config.seed, number, dropout
        self.quantized = config.quantize is not None
        self.weight = linear.weight
        N, K = linear.weight.shape
        if self.quantized:
            codes = torch.empty(N, K // 2, dtype=torch.uint8)
            self.weight = nn.Parameter(codes, requires_grad=False)
            blocks = N * K // nf4.BLOCK
            nested = torch.empty(-(-blocks // nf4.NESTED_BLOCK))
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8), persistent=False)
            self.register_buffer("nested", nested, persistent=False)
            self.register_buffer("offset", torch.empty(()), persistent=False)
        self.register_buffer("feature_keys", torch.empty(K, dtype=torch.int32), persistent=False)
        self.lora_A = nn.Linear(K, self.rank, bias=False)
        self.lora_B = nn.Linear(self.rank, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nf4.linear(x, self.state()) if self.quantized else F.linear(x, self.weight)
        x = self.dropout.drop(x, self.feature_keys)
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)  # from fp32
        h = F.linear(x, A) * self.scale  # (T, R): scaled where it is small
        return y.addmm_(h, B.T)

    def state(self) -> nf4.NF4:
        """The quantised weight; while FSDP has gathered it, all of it."""
        return nf4.NF4(self.weight, self.absmax, self.nested, self.offset)

    @torch.no_grad()
    def load_rows(self, rows: Tensor | nf4.NF4, first: int) -> None:
        """Take this rank's rows (n, K) of W, the first of which is `first`, and start A and B.

        A `rows` that is an `NF4` is the whole weight, quantised before. Every rank calls it.
        """
        local, _ = local_rows(self.weight)
        if self.quantized:
            if isinstance(rows, nf4.NF4):
                codes, scales = rows.codes[first : first + len(local)], rows[1:]
            else:
                codes, scales = self.quantize_rows(rows.to(local.device), first)
            rows = codes
            for buffer, values in zip((self.absmax, self.nested, self.offset), scales, strict=True):
                buffer.copy_(values)
        local.copy_(rows)
        self.start()

    def quantize_rows(self, rows: Tensor, first: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes of this rank's rows, and the scales of all: the ranks exchange them before they are
        quantised themselves, so that the result is that of a weight quantised whole."""
        codes, own = nf4.quantize_blocks(rows)
        absmax = torch.zeros(len(self.absmax), device=rows.device)
        absmax[self.blocks_of(first, len(rows))] = own
        if isinstance(self.weight, DTensor):
            dist.all_reduce(absmax, dist.ReduceOp.MAX)  # of zeros, and of equals where rows repeat
        return codes, nf4.quantize_scales(absmax)

    def blocks_of(self, first: int, rows: int) -> slice:
        """The blocks of 64 weights that some rows are."""
        per_row = self.in_features // nf4.BLOCK
        return slice(first * per_row, (first + rows) * per_row)

    @torch.no_grad()
    def start(self) -> None:
        """A and B as they are before training, the same for any number of ranks."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.number)
        A = torch.rand(self.rank, self.in_features, generator=generator) * 2 - 1
        local, first = local_rows(self.lora_A.weight)
        local.copy_(A[first : first + len(local)] / self.in_features**0.5)
        self.lora_B.weight.zero_()
        self.feature_keys.copy_(self.dropout.feature_keys(self.number, self.in_features))

    @torch.no_grad()
    def merged_rows(self, first: int) -> Tensor:
        """This rank's rows (n, K) of W + (alpha / R) B A in fp32. Every rank calls it.

        Of the W that was trained on: decoded, where it is quantised. The sum is rounded later, and
        once: added to a W already rounded to bf16, half of a change of a thousandth is lost.
        """
        local, _ = local_rows(self.weight)
        A = self.lora_A.weight
        A = A.full_tensor() if isinstance(A, DTensor) else A
        base = local.float()
        if self.quantized:
            scales = nf4.decode_scales(self.state())[self.blocks_of(first, len(local))]
            base = nf4.decode_blocks(local, scales, torch.float32)
        return base.addmm(local_rows(self.lora_B.weight)[0], A, alpha=self.scale)
