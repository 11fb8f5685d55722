"""How long an update takes on GPUs: FLOPs, bytes and exchanged bytes over measured rates.

All rates come from one step that was measured and profiled: 7B, 32 layers, one row of 16,384 tokens
of documents of 490 tokens on average, every block recomputed, one H200 (results/gpu/step.json). Its
kernels, and what each is taken for here:

    matrix products                 1,117 ms    FLOPs, at MATRIX of the peak
    norms, rotation, SwiGLU, sums     192 ms    POINTWISE x bytes, each tensor read and written once
    attention                         105 ms    ATTENTION x what its kernels take alone
    optimizer                          77 ms    OPTIMIZER x 40 bytes a weight
    other (FSDP2's casts)              64 ms    CASTS x bytes
    between kernels                    21 ms    IDLE of all that

Two more constants are of the runs of the loops (results/gpu/*.jsonl): HOST, by the update with the
shortest row, and LOOP, by the second update of DPO.

bench.py plan prints what this says of the other steps that were measured. On other GPUs the same
shares of their peaks are assumed. Exchange between ranks hides behind computation as far as that
lasts (FSDP2 gathers a block ahead); no measurement of it on several GPUs has been made.
"""

from dataclasses import dataclass

from model import LlamaConfig
from planning.gpus import GPU, MACHINE, ring_bandwidth
from planning.memory import Layout, adapter_weights, block_matrices, block_weights, stored

MATRIX = 0.780  # of the datasheet's peak: 862 TFLOP in 1,117 ms at 989 TFLOP/s
MEMORY = 0.896  # of the datasheet's bandwidth: a copy at 4.3 of 4.8 TB/s
POINTWISE = 2.69
OPTIMIZER = 1.22
CASTS = 1.69
IDLE = 0.013
HOST = 0.008  # seconds a block: Python starts its kernels, forward and backward, no faster
LOOP = 0.047  # seconds an update beside its rows: packing, sums over ranks, waiting for the loss
# Attention on an H200, seconds: of a document's n² and of each token, per query head and layer of
# size 128. Solved from rows of documents of 490 and of 1,097 tokens on average (kernels.json).
ATTENTION = 1.166  # in the step, over what the kernels took alone
FORWARD = 6.230e-13, 5.558e-10
BACKWARD = 1.782e-12, 1.334e-9
TUNED_FOR = 989e12  # peak of the GPU that those are of; others in proportion


@dataclass(frozen=True)
class Row:
    """The documents of one forward pass, as far as time depends on them."""

    tokens: int
    squares: int  # sum of the squared lengths of its documents
    predicted: int  # trained tokens


def matrix_flops(config: LlamaConfig, layout: Layout, row: Row) -> tuple[int, int]:
    """FLOPs of the matrix products of (forward, backward); the head counts as backward.

    Without recomputation and with attention's they are `model_flops` of training/update.py.
    Adapters: the frozen weights need no gradient, theirs three products as every weight.
    """
    L, V, E = config.num_hidden_layers, config.vocab_size, config.hidden_size
    matrices = sum(a * b for a, b in block_matrices(config))
    forward, head = 2 * L * matrices * row.tokens, 2 * V * E * row.predicted
    if not layout.lora_rank:
        return forward, 2 * forward + 3 * head
    adapters = 2 * L * adapter_weights(config, layout.lora_rank) * row.tokens
    return forward + adapters, forward + 2 * adapters + 2 * head


def attention_seconds(config: LlamaConfig, gpu: GPU, row: Row) -> list[float]:
    """Seconds of (forward, backward) of all layers' attention."""
    heads = config.num_attention_heads * config.num_hidden_layers * config.head_dim / 128
    scale = heads * ATTENTION * TUNED_FOR / gpu.flops
    return [scale * (a * row.squares + b * row.tokens) for a, b in (FORWARD, BACKWARD)]


def pointwise_bytes(config: LlamaConfig, layout: Layout, row: Row) -> tuple[int, int]:
    """Bytes of (forward, backward) of norms, rotation, SwiGLU and sums, fused as the compiler does.

    In numbers a token and layer. Forward: both norms and sums 9 E; rotation 2 (H + Hk) D; SwiGLU
    3 F. Backward: 12 E, the same, 5 F.
    """
    E, F = config.hidden_size, config.intermediate_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    numbers = config.num_hidden_layers * row.tokens * layout.width
    eager = 1 if layout.compile else 3  # not fused: each step reads and writes (estimated)
    return eager * numbers * (9 * E + heads + 3 * F), eager * numbers * (12 * E + heads + 5 * F)


def adapter_bytes(config: LlamaConfig, layout: Layout, row: Row) -> tuple[float, float]:
    """Bytes of (forward, backward) that the adapters' thin products and their dropout take.

    In numbers a token and projection of K inputs and N outputs. Forward: A's product K; B's, added
    to the output, 2 N; dropout 2 K. Backward: B's two products 2 N; A's two 2 K, and adding the
    gradient of the input to the other one 3 K. No run of adapters was measured.
    """
    if not layout.lora_rank:
        return 0, 0
    K, N = (sum(sizes) for sizes in zip(*block_matrices(config), strict=True))
    dropped = 0 if not layout.lora_dropout else 2 * K if layout.compile else 6 * K  # (estimated)
    numbers = config.num_hidden_layers * row.tokens * layout.width
    return numbers * (K + 2 * N + dropped), numbers * (5 * K + 2 * N)


def gather_bytes(layout: Layout, trained: int, frozen: float) -> float:
    """Bytes that FSDP2 reads and writes on one rank to gather some weights once.

    trained: weights; frozen: bytes of others. A trained weight's share is cast (4 + 2) and, with
    other ranks, put into the buffer that is gathered (2 + 2); that is copied to where the blocks
    read it (2 + 2). So one rank alone moves 10 bytes a weight, and none of those that are frozen
    (training/parallel.py). Source: FSDPParamGroup's `unshard` and `wait_for_unshard`.
    """
    b, together = layout.width, layout.group > 1
    share = ((4 + b + 2 * b * together) * trained + 2 * frozen * together) / layout.group
    return share + 2 * (b * trained + frozen * together)


def cast_bytes(config: LlamaConfig, layout: Layout, row_number: int) -> tuple[float, float]:
    """Bytes that FSDP2 copies in one row on one rank: (forward, backward).

    Weights as in `gather_bytes`, the blocks' a second time where they are freed after forward. A
    gradient is copied to fp32 (2 + 4); of the share, the sum is copied (8) and, from the second row
    on, added to the earlier rows' (12).
    """
    L, b = config.num_hidden_layers, layout.width
    (block, frozen), root = stored(config, layout)
    trained = L * block + root[0]
    if not layout.wrapped:
        return 0, 12 * trained * (row_number > 0)
    blocks = gather_bytes(layout, L * block, L * frozen)
    reduce = (b + 4) * trained + (8 + 12 * (row_number > 0)) * trained / layout.group
    again = 0 if layout.keeps_gathered else blocks
    return blocks + gather_bytes(layout, *root), reduce + again


def decode_bytes(config: LlamaConfig, layout: Layout) -> float:
    """Bytes of decoding NF4 once for each pass through the blocks: read half a byte, write two."""
    if not layout.quantize:
        return 0
    return 2.52 * config.num_hidden_layers * block_weights(config)


def exchange(config: LlamaConfig, layout: Layout, gpu: GPU) -> tuple[float, float, float]:
    """Seconds of a row's exchange: (forward, backward, that of one block at either end).

    Rings (Patarasuk and Yuan 2009): gathering or reducing M bytes over n ranks takes M (n - 1) / n
    of them through each link; the sum over replicas, twice that of a share.
    """
    L, n, R = config.num_hidden_layers, layout.group, layout.replicas
    if layout.ranks == 1:
        return 0, 0, 0
    (block, frozen), (root, root_frozen) = stored(config, layout)
    gathered = layout.width * (L * block + root) + L * frozen + root_frozen
    sums = 4 * (L * block + root)
    ring = (n - 1) / n / ring_bandwidth(gpu, n)
    # Ranks of a machine sum with other machines' at the same time and share its network.
    between = gpu.link if layout.ranks <= MACHINE else gpu.network / min(n, MACHINE)
    over_replicas = 2 * (R - 1) / R * sums / n / between
    forward = gathered * ring
    backward = (0 if layout.keeps_gathered else gathered) * ring + sums * ring
    if n <= MACHINE < layout.ranks:  # one within the machines, the other between them: together
        backward = max(backward, over_replicas)
    else:
        backward += over_replicas
    return forward, backward, (forward + backward) / L


def row_seconds(
    config: LlamaConfig, layout: Layout, gpu: GPU, row: Row, row_number: int = 0
) -> dict[str, float]:
    """Seconds of one row: `{part: seconds}`; parts are those of the table above and `exchange`."""
    rate = MATRIX * (gpu.flops if layout.dtype != "float32" else gpu.fp32)
    speed = MEMORY * gpu.bandwidth
    again = layout.recompute / config.num_hidden_layers  # share of forward that runs twice
    matrices = [flops / rate for flops in matrix_flops(config, layout, row)]
    attention = attention_seconds(config, gpu, row)
    fused = [POINTWISE * size / speed for size in pointwise_bytes(config, layout, row)]
    adapters = [size / speed for size in adapter_bytes(config, layout, row)]
    # The loss kernel reads and writes logits; NF4 is decoded forward, again, and backward.
    casts = [CASTS * size / speed for size in cast_bytes(config, layout, row_number)]
    decode = decode_bytes(config, layout) / speed
    loss = 10 * row.predicted * config.vocab_size / speed
    computed = [sum(parts) for parts in zip(matrices, attention, fused, adapters, strict=True)]
    forward = computed[0] + casts[0] + decode
    backward = computed[1] + casts[1] + decode + again * (computed[0] + decode)
    sent = exchange(config, layout, gpu)
    exposed = max(0, sent[0] - forward) + max(0, sent[1] - backward) + sent[2]
    parts = {
        "matrix products": matrices[0] * (1 + again) + matrices[1],
        "attention": attention[0] * (1 + again) + attention[1],
        "norms, rotation, SwiGLU": fused[0] * (1 + again) + fused[1],
        "adapters": adapters[0] * (1 + again) + adapters[1],
        "loss": loss,
        "casts, NF4": sum(casts) + decode * (2 + again),
        "exchange, not hidden": exposed,
    }
    host = HOST * config.num_hidden_layers - sum(parts.values())
    return parts | {"waiting for the host": max(0, host)}


def optimizer_seconds(config: LlamaConfig, layout: Layout, gpu: GPU) -> float:
    """AdamW and clipping: each rank's share of the trained weights, 40 bytes each.

    Weight, gradient, moments: 28; the norm reads the gradients (4), and a clipped update scales
    them (8).
    """
    (block, _), (root, _) = stored(config, layout)
    trained = config.num_hidden_layers * block + root
    size = 40 * trained / layout.group
    return OPTIMIZER * size / (MEMORY * gpu.bandwidth)


def update_seconds(
    config: LlamaConfig, layout: Layout, gpu: GPU, rows: list[list[Row]]
) -> dict[str, float]:
    """Seconds of one update by part; rows: one list of `Row` for each rank, equally many.

    Every row ends together on all ranks, since they exchange weights: the slowest counts.
    """
    parts = {}
    for number, same in enumerate(zip(*rows, strict=True)):
        each = [row_seconds(config, layout, gpu, row, number) for row in same]
        slowest = max(each, key=lambda seconds: sum(seconds.values()))
        for name, seconds in slowest.items():
            parts[name] = parts.get(name, 0) + seconds
    parts["optimizer"] = optimizer_seconds(config, layout, gpu)
    parts["between kernels and rows"] = IDLE * sum(parts.values()) + LOOP
    return parts


def forward_seconds(config: LlamaConfig, layout: Layout, gpu: GPU, rows: list[list[Row]]) -> float:
    """Seconds of one forward pass over rows: DPO's reference.

    A third of the matrix products or, where weights are frozen, half.
    """
    total = 0.0
    for same in zip(*rows, strict=True):
        total += max(sum(row_seconds(config, layout, gpu, row).values()) for row in same)
    passes = 2 if layout.lora_rank else 3
    return total / (passes + layout.recompute / config.num_hidden_layers)
