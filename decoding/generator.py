"""Answers from a model, many at a time, or one as a stream.

    prompts ──► put into slots of the cache, longest first ──► one token each, again and again ──┐
                    ▲                                                                            │
                    └── a finished sequence frees its slot ◄── EOS, a stop string, or a limit ◄──┘

Called by generate.py, evaluate.py and demo/compare.py.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from checkpoint.config import read_config
from checkpoint.weights import load_hf
from decoding import scoring
from decoding.cached_model import CachedModel, how_many_fit
from decoding.room import check_gpu, gpu_of
from decoding.sampling import Sampling, choose, complete
from model import Llama
from program.errors import InputError
from tokens.tokenizer import Tokenizer


@dataclass
class Completion:
    """ids: new tokens without EOS · text: of these, up to a stop string · finish: why it ended.

    finish is "eos", "stop", "length" (max_new_tokens), or "context" (the model's limit).
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


@dataclass
class Sequence:
    """A prompt and its answer so far."""

    number: int  # in the caller's list
    prompt: list[int]
    limit: int  # of new tokens
    random: np.random.Generator
    new: list[int] = field(default_factory=list)

    def __len__(self):
        return len(self.prompt) + len(self.new)


class TextGenerator:
    """A model with its tokenizer and cache.

    context: tokens of prompt and answer together · slots: sequences decoded at a time (None: 16 on
    CPU, on a GPU as many as its memory holds) · compile: on a GPU, compile and record a step.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, context: int | None = None,
        slots: int | None = None, compile: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = context or model.config.max_position_embeddings
        self.cached = CachedModel(model, self.context, slots, compile)
        self.streamed = []  # the tokens of the last stream that slot 0 still holds

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: torch.device, dtype: torch.dtype,
        context: int | None = None, slots: int | None = None, compile: bool = True,
    ) -> "TextGenerator":  # fmt: skip
        """Load a Hugging Face folder onto `device`, which must hold all of it.

        Raises `InputError` for a folder that is no Llama checkpoint, and for a GPU that cannot work
        with it, before weights are read.
        """
        config, tokenizer = read_config(folder), Tokenizer(folder)
        tokenizer.check_fits(config.vocab_size)
        with torch.device("meta"):
            model = Llama(config).to(dtype)
        if device.type == "cuda":
            weights = sum(parameter.numel() for parameter in model.parameters())
            check_gpu(folder, config, dtype, weights, gpu_of(device))
        model.to_empty(device=device)
        load_hf(model, folder)
        return cls(model, tokenizer, context, slots, compile)

    @property
    def slots(self) -> int:
        """Sequences that are decoded at a time now."""
        return self.cached.slots

    @property
    def most(self) -> int:
        """The most sequences that may ever be decoded at a time."""
        return self.cached.most

    @property
    def dtype(self) -> torch.dtype:
        return self.cached.dtype

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: range | list[int] | None = None,
        advance: Callable | None = None,
    ) -> list[Completion]:  # fmt: skip
        """A `Completion` of each prompt (a list of token ids), in the prompts' order.

        What is sampled for a prompt depends on its entry of `seeds` (default: its number) and
        `sampling.seed`, not on the other prompts. `advance()` is called as each is finished.
        """
        answers = [Completion(finish="context") for _ in prompts]
        waiting = []
        for number, ids in enumerate(prompts):
            limit = min(sampling.max_new_tokens, self.context - len(ids))
            seed = number if seeds is None else seeds[number]
            random = np.random.default_rng([sampling.seed, seed])
            if limit > 0:
                waiting.append(Sequence(number, ids, limit, random))
            elif advance:
                advance()
        # Taken from the end: the longest first.
        waiting.sort(key=lambda sequence: len(sequence.prompt))
        self.streamed = []
        most = max((len(s.prompt) + s.limit for s in waiting), default=0)
        self.cached.make_room(most, len(waiting))
        shared = self.cached.prefill_shared([s.prompt for s in waiting])
        active = []  # sequence i is in slot i
        while waiting or active:
            logits = []
            if active:
                logits.append(self.next_logits(active))
            free = self.slots - len(active)
            # A few prompts at a time: while they run, all active sequences wait.
            if waiting and (not active or free >= max(1, self.slots // 4)):
                admitted = self.admit(waiting, free)
                fresh = [sequence.prompt for sequence in admitted]
                logits.append(self.cached.prefill(fresh, len(active), shared))
                active += admitted
            tokens = choose(torch.cat(logits), active, sampling).tolist()
            for slot in reversed(range(len(active))):
                sequence = active[slot]
                finish = self.take(sequence, tokens[slot], sampling)
                if finish:
                    answers[sequence.number] = self.completion(sequence, finish, sampling)
                    self.leave(active, slot)
                    if advance:
                        advance()
        return answers

    def admit(self, waiting: list[Sequence], free: int) -> list[Sequence]:
        """Take sequences from the end of `waiting`: as many as fit."""
        lengths = [len(sequence.prompt) for sequence in waiting[-1 : -free - 1 : -1]]
        return [waiting.pop() for _ in range(how_many_fit(lengths, free))]

    def leave(self, active: list[Sequence], slot: int) -> None:
        """Free a slot; the last sequence moves in, so that only the first slots are occupied."""
        last = active.pop()
        if slot < len(active):
            self.cached.cache.copy(len(active), slot, len(last))
            active[slot] = last

    @torch.inference_mode()
    def stream(self, ids: list[int], sampling: Sampling) -> Iterator[tuple[str, str | None]]:
        """Yield `(text, finish)` of one answer piece by piece; only the last finish is not None.

        Tokens at the beginning that the last stream had too (the earlier turns of a chat) do not
        run again, not even if that stream was closed before its end.
        """
        limit = min(sampling.max_new_tokens, self.context - len(ids))
        if limit < 1:
            raise InputError(f"a prompt has {len(ids)} tokens, the model's context {self.context}")
        cache = self.cached.cache
        if cache is None or cache.capacity < len(ids) + limit:
            self.streamed = []
            room = min(2 * (len(ids) + limit), self.context)  # for more turns, too
            self.cached.make_room(room, sequences=1)
        known = len(os.path.commonprefix([self.streamed, ids[:-1]]))
        sequence = Sequence(0, ids, limit, np.random.default_rng([sampling.seed, len(ids)]))
        self.streamed = self.streamed[:known]
        logits = self.cached.extend(0, known, ids[known:])
        self.streamed, yielded, finish = list(ids), 0, None
        while True:
            finish = self.take(sequence, choose(logits, [sequence], sampling).item(), sampling)
            text = self.completion(sequence, finish, sampling).text
            ready = len(text) if finish else complete(text, sampling.stop)
            if finish or ready > yielded:
                yield text[yielded:ready], finish
            if finish:
                return
            yielded = max(yielded, ready)
            logits = self.next_logits([sequence])
            self.streamed.append(sequence.new[-1])

    @torch.inference_mode()
    def option_logps(
        self, prompts: list[list[int]], options: list[list[list[int]]]
    ) -> list[list[float]]:
        """log p(option | prompt), summed over the option's tokens, for each option of each prompt.

        prompts: lists of token ids; options[i]: lists of token ids that may follow prompts[i].
        Returns lists of floats, as options.
        """
        self.streamed = []
        return scoring.option_logps(self.cached, prompts, options)

    def next_logits(self, active: list[Sequence]) -> torch.Tensor:
        """Logits (B, V) after the last token of each sequence."""
        tokens = [sequence.new[-1] for sequence in active]
        return self.cached.next_logits(tokens, [len(sequence) for sequence in active])

    def take(self, sequence: Sequence, token: int, sampling: Sampling) -> str | None:
        """Add a token to a sequence; why that ends it, or None."""
        if token == self.tokenizer.eos_id:
            return "eos"
        sequence.new.append(token)
        # A character takes at most four tokens. The first one of the tail may be incomplete.
        tail = sequence.new[-4 * max(map(len, sampling.stop), default=0) - 4 :]
        text = self.tokenizer.continuation(tail) if sampling.stop else ""
        if any(stop in text for stop in sampling.stop):
            return "stop"
        if len(sequence.new) == sequence.limit:
            return "length" if sequence.limit == sampling.max_new_tokens else "context"
        return None

    def completion(self, sequence: Sequence, finish: str | None, sampling: Sampling) -> Completion:
        """The answer so far, its text cut at the first stop string."""
        text = self.tokenizer.continuation(sequence.new)
        ends = [text.find(stop) for stop in sampling.stop]
        end = min((e for e in ends if e >= 0), default=len(text))
        return Completion(sequence.new, text[:end], finish)
