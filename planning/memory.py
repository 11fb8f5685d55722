"""How much memory of one GPU an update takes, item by item: arithmetic, nothing is allocated.

An update passes through moments: the end of a forward pass (head and loss), the backward pass of
each block, the reduction of that block's gradients, the reduction of embedding and head, the
optimizer. `moments` states what is alive at each of them; the largest is the peak. What is alive:

    weights, gradients, AdamW's two moments    fp32, a share of each on every rank of a replica
    gathered    the weights that a block computes with, in the compute type. Several ranks hold the
                root (embedding, last norm, head), the block at work and, in backward, the next
                one, which FSDP2 gathers ahead. One rank keeps them all between forward and backward
    reduce      gradients in the compute type until they are summed over ranks; the fp32 copy that
                is summed, kept until the next block's turn
    activations what blocks keep for backward, and what the block at work needs besides
    loss        the head's and the loss kernel's workspace
    reserve     what cannot be computed: see `reserve`

tests/planning/test_memory.py compares these with torch's FSDPMemTracker, with the graph that
torch.compile's partitioner makes, and with the peaks measured on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model import LlamaConfig
from program.errors import InputError, amount

GIB = 2**30
# Bytes of a weight in NF4 with double quantisation: its code of 4 bits; an 8-bit scale for each 64
# weights, an fp32 scale for each 256 of those (Dettmers et al. 2023, arXiv 2305.14314, section 3).
NF4_CODE, NF4_SCALES = 0.5, 1 / 64 + 4 / (64 * 256)
# Bytes of fp32 logits that the loss kernel holds at most at a time: kernels/cross_entropy.py.
LOGITS = 256 << 20


@dataclass(frozen=True)
class Layout:
    """How a run is laid out on its ranks, as far as memory and time depend on it."""

    ranks: int = 1
    replicas: int = 1  # groups of ranks that hold the whole model once each
    row_tokens: int = 16384  # tokens of the longest row, one forward pass of one rank
    rows: int = 2  # forward passes of a rank in one update
    predicted: int = 16384  # trained tokens of that row
    recompute: int = 0  # the last so many blocks compute their activations again in backward
    compile: bool = True  # torch.compile for each block
    dtype: str = "bfloat16"  # to compute in
    reshard: bool | None = None  # gathered weights freed after forward (None: several ranks do)
    lora_rank: int = 0  # of the adapters (0: all weights are trained)
    lora_dropout: float = 0.1  # on the adapters' input
    quantize: str | None = None  # nf4: how the frozen projections are held

    @property
    def group(self) -> int:
        """Ranks that share one copy of the model."""
        return self.ranks // self.replicas

    @property
    def width(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.dtype == "float32" else 2

    @property
    def wrapped(self) -> bool:
        """Whether FSDP2 is used at all: a single rank in fp32 has nothing to gather or to cast."""
        return self.ranks > 1 or self.dtype != "float32"

    @property
    def keeps_gathered(self) -> bool:
        """Whether all gathered weights stay between forward and backward."""
        return self.group == 1 and not (self.lora_rank if self.reshard is None else self.reshard)


def block_matrices(config: LlamaConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the seven projections of a block."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, Hk = config.num_attention_heads, config.num_key_value_heads
    return [(E, H * D), (E, Hk * D), (E, Hk * D), (H * D, E), (E, F), (E, F), (F, E)]


def block_weights(config: LlamaConfig) -> int:
    """Weights of one block: its projections and two norms."""
    return sum(a * b for a, b in block_matrices(config)) + 2 * config.hidden_size


def root_weights(config: LlamaConfig) -> int:
    """Weights outside the blocks: embedding, head (unless tied) and the last norm."""
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


def weights(config: LlamaConfig) -> int:
    """All weights of the model."""
    return config.num_hidden_layers * block_weights(config) + root_weights(config)


def adapter_weights(config: LlamaConfig, rank: int) -> int:
    """Weights of one block's adapters: A (rank, inputs), B (outputs, rank) each."""
    return sum(rank * (a + b) for a, b in block_matrices(config))


def stored(config: LlamaConfig, layout: Layout) -> tuple[tuple[int, float], tuple[int, float]]:
    """Of a block and of the root: (trained weights, bytes of frozen ones), of all ranks together.

    A trained weight is fp32. A frozen one has 2 bytes or, in a block's projections, NF4's code.
    """
    block, root, r = block_weights(config), root_weights(config), layout.lora_rank
    if not r:
        return (block, 0), (root, 0)
    frozen = (NF4_CODE if layout.quantize else layout.width) * block
    return (adapter_weights(config, r), frozen), (0, layout.width * root)


def nf4_buffers(config: LlamaConfig, layout: Layout) -> tuple[float, int]:
    """Bytes that every rank has whole: of NF4's scales, and of the one buffer to decode into."""
    if not layout.quantize:
        return 0, 0
    largest = max(a * b for a, b in block_matrices(config))
    return NF4_SCALES * config.num_hidden_layers * block_weights(config), layout.width * largest


def kept(config: LlamaConfig, layout: Layout) -> int:
    """Bytes that a block which is not recomputed keeps for backward, of a row.

    Compiled, what the partitioner of torch.compile saves: the input, both normalised inputs, the
    output of attention's last projection, q, k, v, attention's output and logsumexp, gate, up and
    their product, the two norms' factors. Eagerly each norm keeps its input in fp32 and what it
    multiplies by its weight, and SwiGLU four tensors; the input itself is not kept.
    """
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, Hk = config.num_attention_heads, config.num_key_value_heads
    T, b = layout.row_tokens, layout.width
    attention = b * T * (2 * H * D + 2 * Hk * D) + 4 * H * T
    rest = b * T * (4 * E + 3 * F) if layout.compile else b * T * (4 * E + 4 * F) + 8 * T * E
    return attention + rest + 8 * T + adapter_activations(config, layout)


def adapter_activations(config: LlamaConfig, layout: Layout) -> int:
    """Bytes that the adapters keep: their input after dropout, and the product with A.

    Eagerly dropout's mask, too, a byte an element; compiled, backward computes it again.
    """
    r, b = layout.lora_rank, layout.width
    if not r:
        return 0
    inputs = sum(a for a, _ in block_matrices(config)) if layout.lora_dropout else 0
    mask = 0 if layout.compile else 1
    return layout.row_tokens * ((b + mask) * inputs + 7 * b * r)


def working_set(config: LlamaConfig, layout: Layout) -> int:
    """Bytes that the block at work needs in backward beside what it kept, of a row.

    At SwiGLU, the widest place: the gradients of the product, of gate and of up, of which eager
    execution frees one tensor before; and the gradient of the block's output.
    """
    E, F = config.hidden_size, config.intermediate_size
    T, b = layout.row_tokens, layout.width
    return b * T * ((3 if layout.compile else 2) * F + E)


def check_layout(config: LlamaConfig, layout: Layout) -> None:
    """Raise `InputError` unless the model's blocks and the ranks can be laid out so."""
    L = config.num_hidden_layers
    if not 0 <= layout.recompute <= L:
        raise InputError(
            f"--recompute is {layout.recompute}, expected 0 to {L}, the model's blocks"
        )
    if layout.replicas < 1 or layout.ranks % layout.replicas:
        raise InputError(
            f"--replicas is {layout.replicas}, expected a divisor of the "
            f"{amount(layout.ranks, 'ranks')}"
        )


def moments(config: LlamaConfig, layout: Layout) -> Iterator[tuple[str, dict[str, float]]]:
    """`(name, {item: bytes})` of every moment of an update's last row, on one rank."""
    L, E, T, b = config.num_hidden_layers, config.hidden_size, layout.row_tokens, layout.width
    group, all_kept, stream = layout.group, layout.keeps_gathered, b * E * T
    (block, frozen), (root, root_frozen) = stored(config, layout)
    full, sums, root_sums = 4 * (L * block + root), 4 * block, 4 * root  # gradients in fp32
    # What is gathered of a block, of the root: one rank has the frozen weights themselves.
    n, r = b * block + frozen * (group > 1), b * root + root_frozen * (group > 1)
    head = b * config.vocab_size * E if root else 0  # its gradient waits for the root's turn
    own, root_own = b * block, b * root  # gradients in the compute type
    scales, decoded = nf4_buffers(config, layout)
    share = (full + L * frozen + root_frozen) / group
    states = {"weights": share + scales, "moments": 2 * full / group}
    if not layout.wrapped:
        n = r = head = own = root_own = sums = root_sums = 0
    block_kept, working = kept(config, layout), working_set(config, layout)
    # What blocks hold until their turn: those that are recomputed, their input alone.
    held = [block_kept if i < L - layout.recompute else stream for i in range(L)]
    again = 0 if layout.compile else stream  # eager recomputation holds the input beside
    row = 2 * b * T * config.head_dim + 24 * T + decoded  # with cos, sin; ids, positions, documents

    def moment(name, gathered, done, reduce, activations, loss=0):
        """done: fp32 gradients so far, all ranks together; from the second row on, all exist."""
        gradients = full if layout.rows > 1 else min(full, done)
        items = {"gathered": gathered, "gradients": gradients / group, "reduce": reduce}
        return name, states | items | {"activations": activations + row, "loss": loss}

    # The last norm keeps its fp32 input and two copies. The last block's buffer is freed after it.
    last = L * n if all_kept else n * (group > 1)
    below = sum(held)  # what the blocks before the one at work hold
    norm = (4 + 2 * b) * E * T
    yield moment("loss", r + last, 0, 0, below + norm, loss_bytes(config, layout))
    for i in reversed(range(L)):
        ahead = n * (i if all_kept else min(i, 1) * (group > 1))  # of the blocks still to come
        waiting = sums if i + 1 < L else 0  # the fp32 copy of the block before
        done, below = 4 * block * (L - 1 - i), below - held[i]
        # At SwiGLU only the gradient of the down projection exists; at the end, all of the block's.
        wide = below + block_kept + working + (again if held[i] < block_kept else 0)
        reduce = head + waiting + min(own, b * E * config.intermediate_size)
        yield moment(f"block {i}, SwiGLU", r + n + ahead, done, reduce, wide)
        end = below + (8 if layout.compile else 14) * stream
        yield moment(f"block {i}, first norm", r + n + ahead, done, head + waiting + own, end)
        new = sums / group if layout.rows > 1 else 0  # until it is added to the earlier rows'
        reduce = head + sums + max(own, new)
        yield moment(f"block {i}, sum", r + ahead, done + 4 * block, reduce, below + stream)
    blocks = 4 * L * block
    yield moment("embedding", r, blocks, sums + root_own, stream)
    new = root_sums / group if layout.rows > 1 else 0
    yield moment("embedding, sum", 0, full, root_sums + max(root_own, new), 0)
    yield moment("optimizer", 0, full, 0, 0)


def loss_bytes(config: LlamaConfig, layout: Layout) -> int:
    """Bytes of head and loss: hidden states and their gradient, the head's gradient in fp32, if it
    is trained, beside a chunk of logits or its copy in the compute type (kernels/cross_entropy.py).
    """
    V, E, N, b = config.vocab_size, config.hidden_size, layout.predicted, layout.width
    head = 0 if layout.lora_rank else V * E
    rows = min(N, max(1, LOGITS // (4 * V) // 1024) * 1024)  # of a chunk: whole tiles
    return 2 * b * N * E + 4 * head + max(4 * rows * V, b * head)


def reserve(layout: Layout, tensors: float) -> float:
    """Bytes for what no arithmetic knows, beside `tensors` bytes: an allowance, not a measurement.

    The gaps that the caching allocator cannot use (rows differ in length): 3 %. cuBLAS's two
    workspaces of 32 MiB (measured peaks are 64 MiB above the tensors). With several ranks, NCCL's
    buffers: 1.5 GiB (users report 1 to 4).
    """
    return 0.03 * tensors + (64 << 20) + (1.5 * GIB if layout.ranks > 1 else 0)


def peak(config: LlamaConfig, layout: Layout) -> tuple[str, dict[str, float]]:
    """`(moment, {item: bytes})` at the moment when the tensors of an update take the most."""
    return max(moments(config, layout), key=lambda moment: sum(moment[1].values()))


def memory(config: LlamaConfig, layout: Layout) -> dict[str, float]:
    """GiB of one GPU by item, at the peak, and their `total`; `other` is reduce and reserve.

    Raises `InputError` where --replicas does not divide the ranks, or --recompute exceeds the
    blocks.
    """
    check_layout(config, layout)
    _, items = peak(config, layout)
    tensors = sum(items.values())
    other = items.pop("reduce") + reserve(layout, tensors)
    gib = {name: size / GIB for name, size in (items | {"other": other}).items()}
    names = ("weights", "gradients", "moments", "gathered", "activations", "loss", "other")
    return {name: gib[name] for name in names} | {"total": sum(gib.values())}
