"""Does a run fit a GPU, what is recomputed so that it does, and the least change where it does not.

Everything is asked of planning/memory.py. The loops call `check_fits` before they load anything;
plan.py prints what it says. `available` is always GiB of one GPU that PyTorch can use.
"""

import bisect
import dataclasses
from collections.abc import Callable

from model import LlamaConfig
from planning.memory import Layout, block_weights, memory, stored
from planning.speed import CASTS, gather_bytes
from program.errors import InputError, amount

# Products of matrices do about so many FLOPs in the time in which a byte is read or written: 760
# TFLOP/s over 4.3 TB/s measured on an H200, 253 on an H100. Larger means: a cast costs more.
FLOPS_PER_BYTE = 177
NEAR = 0.95  # of what is available: beyond it, a run that fits by this arithmetic may not in truth
RANK = 64  # of the adapters that are proposed: Tulu 2's QLoRA


def fits(config: LlamaConfig, layout: Layout, available: float) -> bool:
    """Whether the peak is within `available` GiB."""
    return memory(config, layout)["total"] <= available


def recompute_needed(config: LlamaConfig, layout: Layout, available: float) -> int | None:
    """The fewest last blocks that must be recomputed to fit; None where all are not enough."""

    def enough(count):
        return fits(config, dataclasses.replace(layout, recompute=count), available)

    blocks = config.num_hidden_layers
    if not enough(blocks):
        return None
    # More recomputation takes less memory, so a bisection finds the first count that fits.
    return bisect.bisect_left(range(blocks), True, key=enough)


def fastest(config: LlamaConfig, layout: Layout, available: float) -> Layout | None:
    """The layout with `recompute` and `reshard` so that it fits and is fastest; None if none fits.

    A rank that holds the whole model keeps its gathered weights. Freed after use, they make room
    for blocks that are then not recomputed, and are cast once more for every row.
    """
    choices = [layout]
    if layout.keeps_gathered and layout.reshard is None and layout.wrapped:
        choices.append(dataclasses.replace(layout, reshard=True))
    found = []
    for choice in choices:
        count = recompute_needed(config, choice, available)
        if count is not None:
            # Per row: what recomputed blocks multiply, and the bytes of a second cast, as FLOPs.
            again = 2 * block_weights(config) * layout.row_tokens * count
            blocks = [config.num_hidden_layers * size for size in stored(config, choice)[0]]
            casts = 0 if choice.keeps_gathered else CASTS * gather_bytes(choice, *blocks)
            cost = again + casts * FLOPS_PER_BYTE
            found.append((cost, len(found), dataclasses.replace(choice, recompute=count)))
    return min(found)[2] if found else None


def chosen(config: LlamaConfig, layout: Layout, available: float, recompute: int | None) -> Layout:
    """The layout that a run takes on GPUs that have `available` GiB, whether it fits or not.

    recompute: the number of blocks, or None: as few as leave a twentieth of the memory free, or
    all of them where no number does.
    """
    if recompute is None:
        least = {"recompute": config.num_hidden_layers, "reshard": layout.wrapped}
        found = fastest(config, layout, NEAR * available)
        return found or dataclasses.replace(layout, **least)
    layout = dataclasses.replace(layout, recompute=recompute)
    if layout.wrapped and layout.keeps_gathered and not fits(config, layout, NEAR * available):
        return dataclasses.replace(layout, reshard=True)
    return layout


def changes(
    config: LlamaConfig, layout: Layout, available: float, shortest: int = 8192
) -> list[tuple[str, Layout]]:
    """What would make a layout fit that does not, the least change first: `[(text, layout)]`.

    Each is worked out on its own, with whatever must be recomputed. shortest: tokens of the longest
    conversation (pair), below which a row cannot go. Where no single change is enough on these
    GPUs, the first of `combinations` comes last.
    """

    def enough(**fields):
        changed = dataclasses.replace(layout, **fields)
        count = recompute_needed(config, changed, available)
        return None if count is None else dataclasses.replace(changed, recompute=count)

    found = []
    if changed := enough():
        found.append((f"--recompute {changed.recompute}", changed))
    for replicas in range(layout.replicas - 1, 0, -1):
        if layout.ranks % replicas == 0 and (changed := enough(replicas=replicas)):
            found.append((f"--replicas {replicas}", changed))
            break
    for tokens in range((layout.row_tokens - 1) // 1024 * 1024, shortest - 1, -1024):
        fields = {"row_tokens": tokens, "predicted": min(tokens, layout.predicted)}
        if changed := enough(**fields, rows=max(2, layout.rows)):  # shorter ones are more
            found.append((f"--micro-tokens {tokens}", changed))
            break
    for ranks in larger(layout):
        if changed := enough(ranks=ranks):
            found.append((amount(ranks, "GPUs"), changed))
            break
    adapters = {"lora_rank": layout.lora_rank or RANK}
    for fields in (adapters, adapters | {"quantize": "nf4"}):
        flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in fields.items())
        if fields != {name: getattr(layout, name) for name in fields}:
            if changed := enough(**fields):
                found.append((flags.strip(), changed))
                break
    if all(changed.ranks > layout.ranks for _, changed in found):
        grow = not found
        found += combinations(layout, adapters | {"quantize": "nf4"}, shortest, enough, grow)
    return [(text + recomputation(text, layout, changed), changed) for text, changed in found]


def recomputation(text: str, layout: Layout, changed: Layout) -> str:
    """What must be said beside a change that needs more recomputed blocks than were asked for."""
    said = changed.recompute <= layout.recompute or text.startswith("--recompute")
    return "" if said else f" with --recompute {changed.recompute}"


def combinations(
    layout: Layout, nf4: dict, shortest: int, enough: Callable, grow: bool
) -> list[tuple[str, Layout]]:
    """The first of short rows, NF4 or both that fits on these GPUs or, with `grow`, on more."""
    rows = {"row_tokens": shortest, "predicted": min(shortest, layout.predicted)}
    rows |= {"rows": max(2, layout.rows)}
    short, quantised = (
        f"--micro-tokens {shortest}",
        f"--lora-rank {nf4['lora_rank']} --quantize nf4",
    )
    choices = [(short, rows), (quantised, nf4), (f"{short} {quantised}", rows | nf4)]
    for text, fields in choices if layout.row_tokens > shortest else choices[1:2]:
        for ranks in [layout.ranks, *larger(layout) * grow]:
            if changed := enough(**fields, ranks=ranks):
                more = f" on {amount(ranks, 'GPUs')}" * (ranks > layout.ranks)
                return [(text + more, changed)]
    return []


def larger(layout: Layout) -> list[int]:
    """More GPUs than the layout's that its replicas divide: up to 8 of a machine, then machines."""
    counts = [1, 2, 4, *range(8, 1025, 8)]
    return [n for n in counts if n > layout.ranks and n % layout.replicas == 0]


def check_fits(
    config: LlamaConfig, layout: Layout, available: float, shortest: int = 8192
) -> tuple[dict[str, float], str | None]:
    """GiB by item where the layout fits, with a warning or None: `(memory, warning)`.

    Raises `InputError`, with the least change that would, where it does not.
    """
    gib = memory(config, layout)
    needs = (
        f"one GPU needs {gib['total']:.1f} GiB ({amount(layout.ranks, 'GPUs')}, rows of "
        f"{layout.row_tokens:,} tokens, --recompute {layout.recompute})"
    )
    if gib["total"] > available:
        found = [text for text, _ in changes(config, layout, available, shortest)]
        advice = f"what would fit: {', or '.join(found)}" if found else "no number of GPUs would do"
        raise InputError(f"{needs}, expected at most {available:.1f}; {advice}")
    warning = None
    if gib["total"] > NEAR * available:
        warning = f"{needs}, {available:.1f} are there: it may run out of memory"
    return gib, warning
