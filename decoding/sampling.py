"""How the next token is chosen, and how much of an unfinished answer may be shown.

Called by generator.py after every step.
"""

from dataclasses import dataclass

import torch

from program.errors import RunError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to end."""

    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0, or less than 1e-6: always the likeliest token
    top_p: float = 1.0  # choose among the fewest likeliest tokens with this much probability
    stop: tuple[str, ...] = ()  # an answer ends before the first of these strings
    seed: int = 42


def choose(logits, sequences, sampling):
    """The next token (B,) of each sequence from logits (B, V): the likeliest, or a sample.

    Sampling draws one number u from each sequence's own generator, `sequence.random`, and takes the
    first token, likeliest first, at which the cumulative probability passes u times that of all
    tokens allowed by top_p (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751, section 3.1).
    """
    best = logits.argmax(-1, keepdim=True)  # if there is a NaN, its place
    if not logits.gather(1, best).isfinite().all():
        raise RunError("the model's logits are not finite: its weights are damaged")
    # fp32 logits that differ at all differ by more than 1e-6, and a quotient must not overflow.
    if sampling.temperature < 1e-6:
        return best[:, 0]
    u = [[sequence.random.random()] for sequence in sequences]
    u = torch.tensor(u, dtype=torch.float64, device=logits.device)
    p = (logits / sampling.temperature).softmax(-1)
    # In a trained model a few likeliest tokens nearly always reach top_p together. For (16, 32,000)
    # on 2 CPU cores, finding them takes 7 ms and sorting all tokens 88.
    for k in (256, p.shape[-1]):
        likeliest, tokens = p.topk(min(k, p.shape[-1]))
        total = likeliest.double().cumsum(-1)
        # With top_p 1 all tokens are allowed, but only those up to u are needed.
        if (total[:, -1:] > (u if sampling.top_p == 1 else sampling.top_p)).all():
            break
    # A token is allowed if the likelier ones alone do not reach top_p.
    allowed = (total - likeliest < sampling.top_p).sum(-1, keepdim=True)
    mass = total.gather(1, allowed - 1) if sampling.top_p < 1 else 1.0
    rank = torch.searchsorted(total, u * mass, right=True).minimum(allowed - 1)
    return tokens.gather(1, rank)[:, 0]


def complete(text, stops):
    """How many characters of an unfinished answer to show: no half character or stop string."""
    text = text.rstrip("\ufffd")  # the bytes of an incomplete character
    begun = (k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
    return len(text) - max(begun, default=0)
