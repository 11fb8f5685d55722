"""How the next token is chosen, and how much of an unfinished answer may be shown.

Called by generator.py after every step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from program.errors import RunError
from program.hardware import on_device

DAMAGED, TOO_FEW = -1, -2  # in place of a token: a logit is no number; see `draw`


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to end."""

    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0, or less than 1e-6: always the likeliest token
    top_p: float = 1.0  # choose among the fewest likeliest tokens with this much probability
    stop: tuple[str, ...] = ()  # an answer ends before the first of these strings
    seed: int = 42


def choose(logits: torch.Tensor, sequences: list, sampling: Sampling) -> torch.Tensor:
    """The next token (B,), on the host, of each sequence from logits (B, V): the likeliest, or a
    sample.

    Sampling draws one number u from each sequence's own generator, `sequence.random`, and takes the
    first token, likeliest first, at which the cumulative probability passes u times that of all
    tokens allowed by top_p (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751, section 3.1).
    """
    best = logits.argmax(-1, keepdim=True)  # if there is a NaN, its place
    finite = logits.gather(1, best).isfinite()
    # fp32 logits that differ at all differ by more than 1e-6, and a quotient must not overflow.
    if sampling.temperature < 1e-6:
        return checked(best.where(finite, DAMAGED))
    u = on_device([[s.random.random()] for s in sequences], logits.device, torch.float64)
    p = (logits / sampling.temperature).softmax(-1)
    # In a trained model a few likeliest tokens nearly always reach top_p together. For (16, 32,000)
    # on 2 CPU cores, finding them takes 7 ms and sorting all tokens 88.
    drawn = checked(draw(p, u, sampling.top_p, 256).where(finite, DAMAGED))
    if (drawn == TOO_FEW).any():
        drawn = checked(draw(p, u, sampling.top_p, p.shape[-1]))
    return drawn


def draw(p: torch.Tensor, u: torch.Tensor, top_p: float, k: int) -> torch.Tensor:
    """Tokens (B, 1) drawn by u (B, 1) from probabilities (B, V), of which the k likeliest are seen.

    TOO_FEW where more would have to be seen.
    """
    likeliest, tokens = p.topk(min(k, p.shape[-1]))
    total = likeliest.double().cumsum(-1)
    # A token is allowed if the likelier ones alone do not reach top_p.
    # (The clamp: none is where a logit is no number.)
    allowed = (total - likeliest < top_p).sum(-1, keepdim=True).clamp(min=1)
    mass = total.gather(1, allowed - 1) if top_p < 1 else 1.0
    rank = torch.searchsorted(total, u * mass, right=True).minimum(allowed - 1)
    drawn = tokens.gather(1, rank)
    if k >= p.shape[-1]:
        return drawn
    # With top_p 1 all tokens are allowed, but only those up to u are needed.
    return drawn.where(total[:, -1:] > (u if top_p == 1 else top_p), TOO_FEW)


def checked(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 1) as (B,) on the host: the one thing for which decoding waits for a GPU."""
    tokens = tokens[:, 0].cpu()
    if (tokens == DAMAGED).any():
        raise RunError("the model's logits are not finite: its weights are damaged")
    return tokens


def complete(text: str, stops: Iterable[str]) -> int:
    """How many characters of an unfinished answer to show: no half character or stop string."""
    text = text.rstrip("\ufffd")  # the bytes of an incomplete character
    begun = (k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
    return len(text) - max(begun, default=0)
