"""Keys and values of the tokens processed so far: the next token costs one token's work.

The rows that go through the model with a cache are of three kinds:

    Prefill      the prompts of several sequences, packed without padding
    DecodeStep   one more token of each sequence: what decoding repeats (on CPU)
    Extension    several more tokens of a sequence: the next turn of a chat, an option to be scored

Each knows the positions of its tokens, and gives every layer a function that first writes the row's
keys and values to the cache and then attends. Called by cached_model.py.

Shapes as in model.py, and: B sequences, S tokens that a sequence has room for.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import attention, document_ends, tiles_on_device
from model import LlamaConfig
from program.errors import RunError
from program.hardware import on_device


class KVCache:
    """Room for `slots` sequences of up to `capacity` tokens.

    keys and values are lists of (slots, Hk, S, D), one a layer: 2·layers·Hk·D elements per token
    (512 KiB for Llama 2 7B in bf16). A key/value head is stored once, and read by its whole group.
    They are views of two tensors, in which all layers of a sequence are copied at once. (Were they
    views of one, the compiled block would copy the whole cache before it changes part of it.)
    """

    def __init__(
        self, config: LlamaConfig, slots: int, capacity: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.slots, self.capacity, self.device = slots, capacity, device
        self.group = config.num_attention_heads // config.num_key_value_heads
        layers, Hk = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, slots, Hk, capacity, config.head_dim)
        # Zeros: masked scores of memory never written could be NaN, and NaN · 0 is NaN.
        try:
            self.both = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
        except torch.OutOfMemoryError:
            raise RunError(
                f"the GPU has no room for the keys and values of {slots} times {capacity} tokens: "
                "try fewer --slots or a smaller --context"
            ) from None
        self.keys, self.values = (tensor.unbind() for tensor in self.both)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of slot `source`."""
        for tensor in self.both:
            tensor[:, target, :, :length] = tensor[:, source, :, :length]


class CachedRow:
    """A row for one forward pass: its tokens' `positions` (T,), and the `slots` (T,) they go to."""

    def __init__(self, cache: KVCache, slots: Tensor | None, positions: Tensor) -> None:
        self.cache, self.slots, self.positions = cache, slots, positions

    def attends(self) -> list[Callable]:
        """For each layer the function (q, k, v) -> out that `Decoder.forward` takes."""
        layers = zip(self.cache.keys, self.cache.values, strict=True)
        return [functools.partial(self.attend, keys, values) for keys, values in layers]

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v (T, Hk, D) of the row's tokens into a layer's cache."""
        keys[self.slots, :, self.positions] = k
        values[self.slots, :, self.positions] = v


def prompt_row(cache: KVCache, slots: list[int], start: int, lengths: list[int]) -> CachedRow:
    """The row of `lengths[i]` tokens for `slots[i]`, which go on from the `start` it holds."""
    if start == 0:
        return Prefill(cache, slots, lengths)
    return Extension(cache, slots, [start] * len(slots), lengths)


class Prefill(CachedRow):
    """Prompts from their first token on: attention is training's, inside each one's document."""

    def __init__(self, cache: KVCache, slots: list[int], lengths: list[int]) -> None:
        device, lengths = cache.device, torch.tensor(lengths)
        starts = lengths.cumsum(0) - lengths
        doc_start = starts.repeat_interleave(lengths).int()
        doc_end = document_ends(doc_start)
        # All of it is made on the host, where the lengths are: the GPU is not waited for.
        slots = torch.tensor(slots).repeat_interleave(lengths)
        positions = torch.arange(len(doc_start)) - doc_start
        super().__init__(cache, *(on_device(x, device) for x in (slots, positions)))
        tiles = tiles_on_device(doc_start, doc_end)
        self.doc_start, self.doc_end, self.tiles = (
            on_device(x, device, torch.int32) for x in (doc_start, doc_end, tiles)
        )

    def attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.write(keys, values, k, v)
        return attention(q, k, v, self.doc_start, self.doc_end, self.tiles)


class DecodeStep(CachedRow):
    """One token of each of the first B slots; `limit`: no sequence is longer, this one included.

    The CPU's; a GPU's is in cuda_graphs.py.

    One call for all sequences, with a mask over what lies beyond each one's end. The queries of a
    group stand where several queries of one head usually do: nothing is repeated in memory.
    """

    def __init__(self, cache: KVCache, positions: Tensor, limit: int) -> None:
        super().__init__(cache, torch.arange(len(positions), device=positions.device), positions)
        self.limit = limit
        seen = torch.arange(limit, device=positions.device) <= positions[:, None]  # (B, limit)
        self.mask = seen[:, None, None]

    def attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.write(keys, values, k, v)
        B, Hk = k.shape[:2]
        keys, values = (x[:B, :, : self.limit] for x in (keys, values))  # (B, Hk, limit, D)
        grouped = q.unflatten(1, (Hk, -1))  # (B, Hk, H / Hk, D)
        # The output's memory may be in another order (on CUDA it is): no `view` of it.
        return scaled_dot_product_attention(grouped, keys, values, self.mask).flatten(1, 2)


class Extension(CachedRow):
    """Documents that go on from the first `starts[i]` tokens of `slots[i]`.

    Several may go on from the same slot and see nothing of each other: in every layer one is
    written, attends, and is overwritten by the next. The last one stays in the slot.
    """

    def __init__(
        self, cache: KVCache, slots: list[int], starts: list[int], lengths: list[int]
    ) -> None:
        self.documents = list(zip(slots, starts, lengths, strict=True))
        self.masks = []  # (G·n, start + n) of each document, the same in all layers; G = H / Hk
        for _, start, n in self.documents:
            seen = torch.ones(n, start + n, dtype=torch.bool, device=cache.device).tril(start)
            self.masks.append(seen.repeat(cache.group, 1))
        positions = [torch.arange(start, start + n) for _, start, n in self.documents]
        super().__init__(cache, None, on_device(torch.cat(positions), cache.device))

    def attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Hk, lengths, outs = k.shape[1], [n for *_, n in self.documents], []
        of_documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        for (slot, start, n), mask, (q_i, k_i, v_i) in zip(
            self.documents, self.masks, of_documents, strict=True
        ):
            end = start + n
            keys[slot, :, start:end] = k_i.transpose(0, 1)
            values[slot, :, start:end] = v_i.transpose(0, 1)
            # The queries of a group one after another: row g·n + i is query i of its head g.
            grouped = q_i.unflatten(1, (Hk, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]
            seen = (x[None, slot, :, :end] for x in (keys, values))  # (1, Hk, end, D)
            out = scaled_dot_product_attention(grouped, *seen, mask)[0]  # (Hk, G·n, D)
            outs.append(out.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(outs)  # (T, H, D)
