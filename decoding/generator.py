"""Answers from a model: batched decoding with a cache, and the likelihood of given answers.

    prompts ──► admitted to slots of the cache, longest first ──► one token each, again and again ─┐
                    ▲                                                                              │
                    └── a finished sequence leaves its slot ◄── EOS, a stop string, or enough ◄────┘

Prompts of different lengths are read as one packed row, finished sequences leave the batch, and
what all prompts begin with (the examples of a benchmark) is read once. Called by generate.py,
evaluate.py and demo.py.
"""

import os
from dataclasses import dataclass, field

import numpy as np
import torch

from checkpoint.config import read_config
from checkpoint.weights import load_hf
from decoding.cuda_graphs import STEP, GraphedStep
from decoding.kv_cache import KVCache, SuffixPass, TokenPass, reading
from decoding.sampling import choose, complete
from model import Llama
from program.errors import InputError
from tokens.tokenizer import Tokenizer

ROW_TOKENS = 8192  # most tokens read in one forward pass, where there is more than one prompt
WORTH_SHARING = 32  # tokens: a shorter common beginning is read again with each prompt


@dataclass
class Completion:
    """ids: new tokens without EOS · text: theirs, up to a stop string · finish: why it ended.

    finish is "eos", "stop", "length" (max_new_tokens), or "context" (the model's limit).
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


@dataclass
class Sequence:
    """A prompt in a slot, and its answer so far."""

    number: int  # in the caller's list
    prompt: list[int]
    most: int  # new tokens at most
    random: np.random.Generator
    new: list[int] = field(default_factory=list)


class TextGenerator:
    """A model with its tokenizer and cache.

    context: tokens of prompt and answer together · slots: sequences decoded at a time.
    """

    def __init__(self, model, tokenizer, context=None, slots=16):
        self.model, self.tokenizer, self.slots = model.eval(), tokenizer, slots
        self.context = context or model.config.max_position_embeddings
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache, self.read = None, []  # read: the tokens of a stream that slot 0 holds
        self.graphs = GraphedStep(self.step) if self.device.type == "cuda" else None

    @classmethod
    def from_folder(cls, folder, device, dtype, context=None, slots=16):
        """Load an HF folder whole onto `device` (one GPU must hold it); raises `InputError`."""
        config, tokenizer = read_config(folder), Tokenizer(folder)
        tokenizer.check_fits(config.vocab_size)
        with torch.device("meta"):
            model = Llama(config).to(dtype)
        model.to_empty(device=device)
        load_hf(model, folder)
        return cls(model, tokenizer, context, slots)

    @torch.inference_mode()
    def generate(self, prompts, sampling, seeds=None, advance=None):
        """A `Completion` of each prompt (a list of token ids), in the prompts' order.

        What is sampled for a prompt depends on its entry of `seeds` (default: its number) and
        `sampling.seed`, not on the other prompts. `advance()` is called as each is finished.
        """
        done = [Completion(finish="context") for _ in prompts]
        waiting = []
        for number, ids in enumerate(prompts):
            most = min(sampling.max_new_tokens, self.context - len(ids))
            seed = number if seeds is None else seeds[number]
            random = np.random.default_rng([sampling.seed, seed])
            if most > 0:
                waiting.append(Sequence(number, ids, most, random))
            elif advance:
                advance()
        waiting.sort(key=lambda sequence: len(sequence.prompt))  # the longest is taken first
        self.make_room(max((len(s.prompt) + s.most for s in waiting), default=0))
        active = []
        shared = self.read_shared([s.prompt for s in waiting])
        while waiting or active:
            logits = []
            if active:
                logits.append(self.next_logits(active))
            free = self.slots - len(active)
            # A few at a time: reading one prompt keeps all the others waiting.
            if waiting and (not active or free >= max(1, self.slots // 4)):
                fresh = self.fitting(waiting, free)
                logits.append(self.read_prompts(fresh, len(active), shared))
                active += fresh
            chosen = choose(torch.cat(logits), active, sampling).tolist()
            for slot in reversed(range(len(active))):
                sequence = active[slot]
                finish = self.take(sequence, chosen[slot], sampling)
                if finish:
                    done[sequence.number] = self.completion(sequence, finish, sampling)
                    self.leave(active, slot)
                    if advance:
                        advance()
        return done

    @torch.inference_mode()
    def stream(self, ids, sampling):
        """Yield `(text, finish)` of one answer piece by piece; finish is None but in the last.

        What the last stream read of the same beginning (the earlier turns of a chat) is not read
        again, also where that stream was closed before its end.
        """
        most = min(sampling.max_new_tokens, self.context - len(ids))
        if most < 1:
            raise InputError(f"a prompt has {len(ids)} tokens, the model's context {self.context}")
        if self.cache is None or self.cache.capacity < len(ids) + most:
            self.make_room(min(2 * (len(ids) + most), self.context))  # room to go on
        known = len(os.path.commonprefix([self.read, ids[:-1]]))
        sequence = Sequence(0, ids, most, np.random.default_rng([sampling.seed, len(ids)]))
        self.read = self.read[:known]
        fresh = self.tensor(ids[known:])
        read = reading(self.cache, [0], known, [len(fresh)])
        logits = self.model(fresh, None, self.tensor([len(fresh) - 1]), cache=read)
        self.read, shown, finish = list(ids), 0, None
        while True:
            finish = self.take(sequence, choose(logits, [sequence], sampling).item(), sampling)
            answer = self.completion(sequence, finish, sampling).text
            ready = len(answer) if finish else complete(answer, sampling.stop)
            if finish or ready > shown:
                yield answer[shown:ready], finish
            if finish:
                return
            shown = max(shown, ready)
            logits = self.next_logits([sequence])
            self.read.append(sequence.new[-1])

    @torch.inference_mode()
    def option_logps(self, prompts, options):
        """log p(option | prompt), summed over the option's tokens, for each option of each prompt.

        prompts: lists of token ids; options[i]: lists of token ids that may follow prompts[i].
        The prompt is read once for all its options. Returns lists of floats, as options.
        """
        found = [[0.0] * len(own) for own in options]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        longest = (max(map(len, own), default=0) for own in options)
        self.make_room(max((len(p) + n for p, n in zip(prompts, longest, strict=True)), default=0))
        shared = self.read_shared(prompts)
        waiting = [Sequence(i, prompts[i], 1, None) for i in reversed(order)]
        while waiting:
            fresh = self.fitting(waiting, self.slots)
            logps = self.read_prompts(fresh, 0, shared).log_softmax(-1)  # (B, V)
            rows = []  # (slot, prompt, option) of those with more than one token
            for slot, sequence in enumerate(fresh):
                for k, option in enumerate(options[sequence.number]):
                    if option:  # an empty one is certain: 0
                        found[sequence.number][k] = logps[slot, option[0]].item()
                    if len(option) > 1:
                        rows.append((slot, sequence, k))
            for begin in range(0, len(rows), self.slots):
                part = rows[begin : begin + self.slots]
                own = [options[s.number][k] for _, s, k in part]
                slots, starts = [slot for slot, *_ in part], [len(s.prompt) for _, s, _ in part]
                nll = self.read_suffixes(slots, starts, own)
                for (_, sequence, k), sums in zip(part, nll, strict=True):
                    found[sequence.number][k] -= sums
        return found

    def read_suffixes(self, slots, starts, options):
        """Summed nll of all tokens but the first of each option, read after a prompt in a slot."""
        lengths = [len(option) - 1 for option in options]
        row = self.tensor([token for option in options for token in option[:-1]])
        labels = self.tensor([token for option in options for token in option[1:]])
        suffix = SuffixPass(self.cache, slots, starts, lengths)
        everywhere = torch.arange(len(row), device=self.device)
        nll = self.model(row, None, everywhere, labels, cache=suffix)
        return [own.sum().item() for own in nll.double().split(lengths)]

    # ---- The cache: who is in which slot

    def make_room(self, tokens):
        """A cache whose slots hold `tokens`, and one slot more for the shared beginning."""
        self.read = []
        if tokens > self.context:
            raise InputError(
                f"a prompt and its answer have {tokens} tokens, expected at most {self.context}"
            )
        if self.cache is None or self.cache.capacity < tokens:
            # Rounded up, so that a little more the next time needs no new one.
            capacity = -(-tokens // STEP) * STEP
            self.cache = None  # the old one goes first
            if self.graphs:
                self.graphs.forget()
            self.cache = KVCache(
                self.model.config, self.slots + 1, capacity, self.device, self.dtype
            )

    def read_shared(self, prompts):
        """Length of what all prompts begin with, read into the last slot; 0: not worth it."""
        # Of an equal prompt the last token is left: its logits are wanted.
        n = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
        if len(prompts) < 2 or n < WORTH_SHARING:
            return 0
        read = reading(self.cache, [self.slots], 0, [n])
        self.model.model(self.tensor(prompts[0][:n]), None, cache=read)
        return n

    def fitting(self, waiting, free):
        """Take the next sequences from `waiting`: as many as are free and fit into one row."""
        fresh, tokens = [], 0
        while waiting and len(fresh) < free:
            tokens += len(waiting[-1].prompt)
            if fresh and tokens > ROW_TOKENS:
                break
            fresh.append(waiting.pop())
        return fresh

    def read_prompts(self, fresh, first, shared):
        """Read prompts into the slots from `first` on: logits (B, V) of their next tokens."""
        slots = range(first, first + len(fresh))
        distinct = {}  # equal prompts (several samples of one) are read once
        for slot, sequence in zip(slots, fresh, strict=True):
            distinct.setdefault(tuple(sequence.prompt), slot)
        rests = [prompt[shared:] for prompt in distinct]
        row, lengths = self.tensor([i for rest in rests for i in rest]), [len(r) for r in rests]
        ends = self.tensor(lengths).cumsum(0) - 1
        own = list(distinct.values())
        if shared:
            for slot in own:
                self.cache.copy(self.slots, slot, shared)
        logits = self.model(row, None, ends, cache=reading(self.cache, own, shared, lengths))
        for slot, sequence in zip(slots, fresh, strict=True):
            source = distinct[tuple(sequence.prompt)]
            if source != slot:
                self.cache.copy(source, slot, len(sequence.prompt))
        index = {slot: i for i, slot in enumerate(own)}
        return logits[self.tensor([index[distinct[tuple(s.prompt)]] for s in fresh])]

    def leave(self, active, slot):
        """Free a slot; the last sequence moves in, so that the first slots are always the taken."""
        last = active.pop()
        if slot < len(active):
            self.cache.copy(len(active), slot, len(last.prompt) + len(last.new))
            active[slot] = last

    # ---- One token

    def next_logits(self, active):
        """Logits (B, V) after the last token of each sequence."""
        tokens = self.tensor([sequence.new[-1] for sequence in active])
        lengths = [len(sequence.prompt) + len(sequence.new) for sequence in active]
        positions = self.tensor(lengths) - 1
        if self.graphs:
            return self.graphs(tokens, positions, max(lengths), self.cache)
        return self.step(tokens, positions, max(lengths))

    def step(self, tokens, positions, limit):
        """Logits (B, V) after `tokens` (B,) at `positions` (B,) of the first B slots."""
        one_each = TokenPass(self.cache, positions, limit)
        return self.model(tokens, None, slice(None), cache=one_each)

    def take(self, sequence, token, sampling):
        """Add a token to a sequence; why that ends it, or None."""
        if token == self.tokenizer.eos_id:
            return "eos"
        sequence.new.append(token)
        # A character takes four tokens at most; the first may be cut off from its like.
        tail = sequence.new[-4 * max(map(len, sampling.stop), default=0) - 4 :]
        text = self.tokenizer.continuation(tail) if sampling.stop else ""
        if any(stop in text for stop in sampling.stop):
            return "stop"
        if len(sequence.new) == sequence.most:
            return "length" if sequence.most == sampling.max_new_tokens else "context"
        return None

    def completion(self, sequence, finish, sampling):
        text = self.tokenizer.continuation(sequence.new)
        ends = [text.find(stop) for stop in sampling.stop]
        end = min((e for e in ends if e >= 0), default=len(text))
        return Completion(sequence.new, text[:end], finish)

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.long, device=self.device)
