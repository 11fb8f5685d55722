"""A model with a KV cache: prompts are put into slots, and logits of their next tokens come out.

Prompts of different lengths run as one packed row, equal prompts run once, and so does what all
prompts begin with (the examples of a benchmark). Which sequence is in which slot is the caller's
business: that of generator.py and scoring.py.
"""

import os

import torch

from decoding.cuda_graphs import GraphedStep
from decoding.kv_cache import CachedRow, DecodeStep, Extension, KVCache, prompt_row
from decoding.room import GPU_STEP, MOST, ON_CPU, ROW_TOKENS, STEP, gpu_of, slots_that_fit
from model import Llama
from program.errors import InputError
from program.hardware import on_device

WORTH_SHARING = 32  # tokens: a shorter common beginning runs again with each prompt


class CachedModel:
    """context: tokens of a prompt and its answer together.

    slots: sequences at a time. None: 16 on CPU; on a GPU as many as its free memory holds, which
    `make_room` decides. compile: see GraphedStep; on CPU nothing is.
    """

    def __init__(self, model: Llama, context: int, slots: int | None, compile: bool = True) -> None:
        self.model, self.context = model, context
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        gpu = self.device.type == "cuda"
        self.by_memory = gpu and slots is None
        self.slots = self.most = slots or (MOST if gpu else ON_CPU)
        self.cache = None
        self.graphs = GraphedStep(model, compile) if gpu else None

    def make_room(self, tokens: int, sequences: int = MOST) -> None:
        """A cache whose slots hold `tokens`, and one slot more for the shared beginning.

        sequences: how many there are to put into slots.
        """
        if tokens > self.context:
            raise InputError(
                f"a prompt and its answer have {tokens} tokens, expected at most {self.context}"
            )
        step = GPU_STEP if self.by_memory else STEP
        capacity, slots = max(1, -(-tokens // step)) * step, self.slots
        if self.by_memory:
            held = sum(tensor.nbytes for tensor in self.cache.both) if self.cache else 0
            free = gpu_of(self.device).free + held
            slots = slots_that_fit(self.model.config, self.dtype, capacity, sequences, free)
        if self.cache is None or self.cache.capacity < tokens or slots >= 2 * self.slots:
            self.cache = None  # frees the old one first
            if self.graphs:
                self.graphs.forget()
            self.slots = slots
            self.cache = KVCache(self.model.config, slots + 1, capacity, self.device, self.dtype)

    def prefill_shared(self, prompts: list[list[int]]) -> int:
        """Put what all prompts begin with into the last slot. Its length; 0: not worth it."""
        # The last token of a prompt is never shared: its logits are wanted.
        n = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
        if len(prompts) < 2 or n < WORTH_SHARING:
            return 0
        self.hidden(self.tensor(prompts[0][:n]), prompt_row(self.cache, [self.slots], 0, [n]))
        return n

    def prefill(self, prompts: list[list[int]], first: int = 0, shared: int = 0) -> torch.Tensor:
        """Put prompts into the slots from `first` on: logits (B, V) of their next tokens.

        They begin with the `shared` tokens that `prefill_shared` put into the last slot.
        """
        prompts = [tuple(prompt) for prompt in prompts]
        slot_of = {}  # of each distinct prompt: only those run
        for slot, prompt in enumerate(prompts, first):
            slot_of.setdefault(prompt, slot)
        if shared:
            for slot in slot_of.values():
                self.cache.copy(self.slots, slot, shared)
        lengths = [len(prompt) - shared for prompt in slot_of]
        ids = self.tensor([i for prompt in slot_of for i in prompt[shared:]])
        row = prompt_row(self.cache, list(slot_of.values()), shared, lengths)
        ends = self.tensor(lengths).cumsum(0) - 1
        logits = self.model.head(self.hidden(ids, row)[ends])
        for slot, prompt in enumerate(prompts, first):
            if slot != slot_of[prompt]:
                self.cache.copy(slot_of[prompt], slot, len(prompt))
        place = {prompt: i for i, prompt in enumerate(slot_of)}
        return logits[self.tensor([place[prompt] for prompt in prompts])]

    def extend(self, slot: int, start: int, ids: list[int]) -> torch.Tensor:
        """Let a slot's first `start` tokens go on with `ids`: logits (1, V) of the next token."""
        row = prompt_row(self.cache, [slot], start, [len(ids)])
        return self.model.head(self.hidden(self.tensor(ids), row)[-1:])

    def nll(
        self, slots: list[int], starts: list[int], continuations: list[list[int]]
    ) -> list[float]:
        """Summed nll of continuations, each but for its first token.

        continuations[i] follows the first starts[i] tokens of slots[i]. Slots may repeat; what they
        hold beyond the start is lost.
        """
        lengths = [len(ids) - 1 for ids in continuations]
        inputs = self.tensor([i for ids in continuations for i in ids[:-1]])
        labels = self.tensor([i for ids in continuations for i in ids[1:]])
        hidden = self.hidden(inputs, Extension(self.cache, slots, starts, lengths))
        nll = self.model.head(hidden, labels).double()
        return torch.stack([part.sum() for part in nll.split(lengths)]).tolist()

    def next_logits(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """Logits (B, V) after one more token of the sequences in the first B slots.

        lengths: of the sequences, the tokens included.
        """
        if self.graphs:
            return self.graphs(tokens, [length - 1 for length in lengths], self.cache)
        row = DecodeStep(self.cache, self.tensor(lengths) - 1, max(lengths))
        return self.model.head(self.hidden(self.tensor(tokens), row))

    def hidden(self, ids: torch.Tensor, row: CachedRow) -> torch.Tensor:
        """Hidden states (T, E) of a row's tokens (T,), whose keys and values are kept."""
        return self.model.model(ids, row.positions, row.attends())

    def tensor(self, values: list | torch.Tensor) -> torch.Tensor:
        return on_device(values, self.device)


def how_many_fit(lengths: list[int], slots: int) -> int:
    """How many prompts of these lengths, in their order, go into `slots` and into one row."""
    tokens = 0
    for n, length in enumerate(lengths):
        tokens += length
        if n == slots or (n > 0 and tokens > ROW_TOKENS):
            return n
    return len(lengths)
