"""Keys and values of the tokens a model has read, so that the next token costs one token's work.

    PromptPass   prompts, packed into one row without padding: read, and kept
    TokenPass    one more token of each sequence: what decoding repeats
    SuffixPass   several more tokens of a sequence: the next turn of a chat, an answer to be scored

Each is what `Llama.forward` takes as `cache`: it knows the positions of the row's tokens, and gives
every layer an attention that first writes the row's keys and values to the cache. Called by
decoding.py, which decides what is read when.

Shapes as in model.py, and: B sequences, S tokens that a sequence has room for.
"""

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import attention, attention_layout
from program.errors import RunError


class KVCache:
    """Room for `slots` sequences of up to `capacity` tokens.

    keys and values are a list of (slots, Hk, S, D), one a layer: 2·layers·Hk·D elements a token
    (512 KiB for Llama 2 7B in bf16). Grouped-query heads are stored once and read by their group.
    """

    def __init__(self, config, slots, capacity, device, dtype):
        self.slots, self.capacity, self.device = slots, capacity, device
        self.group = config.num_attention_heads // config.num_key_value_heads
        # One more than is used: torch.compile takes the whole of a dimension and a part of it for
        # two cases, and would compile the step for both.
        shape = (slots, config.num_key_value_heads, capacity + 1, config.head_dim)
        layers = range(config.num_hidden_layers)
        # Zeros: masked scores of memory never written could be NaN, and NaN · 0 is NaN.
        try:
            self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
            self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        except torch.OutOfMemoryError:
            raise RunError(
                f"the GPU has no room for the keys and values of {slots} times {capacity} tokens: "
                "try fewer --slots or a smaller --context"
            ) from None

    def copy(self, source, target, length):
        """Give slot `target` the first `length` tokens of slot `source`."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class Pass:
    """One forward pass over a row: `positions` (T,) of its tokens, and where they are kept."""

    def __init__(self, cache, slots, positions):
        self.cache, self.slots, self.positions = cache, slots, positions  # slots (T,)

    def attentions(self):
        """For each layer, the function (q, k, v) -> out that its attention calls."""
        for keys, values in zip(self.cache.keys, self.cache.values, strict=True):
            yield functools.partial(self.attend, keys, values)

    def write(self, keys, values, k, v):
        """Keep k and v (T, Hk, D) of the row's tokens."""
        keys[self.slots, :, self.positions] = k
        values[self.slots, :, self.positions] = v


def reading(cache, slots, start, lengths):
    """The pass that reads `lengths[i]` tokens into `slots[i]`, after the `start` ones it holds."""
    if start == 0:
        return PromptPass(cache, slots, lengths)
    return SuffixPass(cache, slots, [start] * len(slots), lengths)


class PromptPass(Pass):
    """Whole prompts, one to a slot: attention is training's, inside each document of the row."""

    def __init__(self, cache, slots, lengths):
        device, lengths = cache.device, torch.tensor(lengths)
        starts = lengths.cumsum(0) - lengths
        self.doc_start = starts.repeat_interleave(lengths).int().to(device)
        self.layout = attention_layout(self.doc_start)
        positions = torch.arange(len(self.doc_start), device=device) - self.doc_start
        slots = torch.tensor(slots).repeat_interleave(lengths).to(device)
        super().__init__(cache, slots, positions)

    def attend(self, keys, values, q, k, v):
        self.write(keys, values, k, v)
        return attention(q, k, v, self.doc_start, self.layout)


class TokenPass(Pass):
    """One token of each of the first B slots; `limit`: no sequence is longer, this one included.

    All sequences in one call, a mask hiding what lies beyond each. A key head's group of queries
    stands where several queries of one head usually do: nothing is repeated in memory.
    """

    def __init__(self, cache, positions, limit):
        super().__init__(cache, torch.arange(len(positions), device=positions.device), positions)
        self.limit = limit
        seen = torch.arange(limit, device=positions.device) <= positions[:, None]  # (B, limit)
        self.mask = seen[:, None, None]

    def attend(self, keys, values, q, k, v):
        self.write(keys, values, k, v)
        (B, H, D), Hk = q.shape, k.shape[1]
        keys, values = (x[:B, :, : self.limit] for x in (keys, values))  # (B, Hk, limit, D)
        grouped = q.view(B, Hk, H // Hk, D)
        return scaled_dot_product_attention(grouped, keys, values, self.mask).view(B, H, D)


class SuffixPass(Pass):
    """Documents that go on from the first `starts[i]` tokens of `slots[i]`.

    Several may go on from the same slot, each unaware of the others: every layer writes one,
    attends, and lets the next overwrite it. What stays in the slot is the last one's.
    """

    def __init__(self, cache, slots, starts, lengths):
        device = cache.device
        self.documents = list(zip(slots, starts, lengths, strict=True))
        self.masks = []  # (G·n, end) of each document, the same in all layers
        for _, begin, n in self.documents:
            seen = torch.ones(n, begin + n, dtype=torch.bool, device=device).tril(begin)
            self.masks.append(seen.repeat(cache.group, 1))
        positions = [torch.arange(begin, begin + n) for _, begin, n in self.documents]
        super().__init__(cache, None, torch.cat(positions).to(device))

    def attend(self, keys, values, q, k, v):
        (_, H, D), Hk = q.shape, k.shape[1]
        lengths, outs = [n for *_, n in self.documents], []
        split = (x.split(lengths) for x in (q, k, v))
        for (slot, begin, n), seen, q_own, k_own, v_own in zip(
            self.documents, self.masks, *split, strict=True
        ):
            end = begin + n
            keys[slot, :, begin:end] = k_own.transpose(0, 1)
            values[slot, :, begin:end] = v_own.transpose(0, 1)
            # The group's queries one after another: row g·n + i is query i of the group's head g.
            grouped = q_own.view(n, Hk, H // Hk, D).permute(1, 2, 0, 3).reshape(1, Hk, -1, D)
            known = (x[None, slot, :, :end] for x in (keys, values))  # (1, Hk, end, D)
            out = scaled_dot_product_attention(grouped, *known, seen)
            outs.append(out.view(Hk, H // Hk, n, D).permute(2, 0, 1, 3).reshape(n, H, D))
        return torch.cat(outs)
