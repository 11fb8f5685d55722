"""How the next token is chosen, and how much of an unfinished answer may be shown.

Called by decoding.py after every step.
"""

from dataclasses import dataclass

import torch

from program.errors import RunError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to end."""

    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0, or less than 1e-6: always the likeliest token
    top_p: float = 1.0  # of the fewest likeliest tokens with this much probability together
    stop: tuple[str, ...] = ()  # an answer ends before the first of these strings
    seed: int = 42


def choose(logits, sequences, sampling):
    """The next token (B,) of each sequence from logits (B, V): the likeliest, or a sample.

    Sampling draws one number u from each sequence's own source, `sequence.random`, and takes the
    first token, likeliest first, at which the cumulative probability passes u times that of all
    tokens allowed by top_p (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751, section 3.1).
    """
    best = logits.argmax(-1, keepdim=True)  # the place of a NaN, where there is one
    if not logits.gather(1, best).isfinite().all():
        raise RunError("the model's logits are not finite: its weights are damaged")
    # fp32 logits that differ at all differ by more than 1e-6, and a quotient must not overflow.
    if sampling.temperature < 1e-6:
        return best[:, 0]
    u = [[sequence.random.random()] for sequence in sequences]
    u = torch.tensor(u, dtype=torch.float64, device=logits.device)
    p = (logits / sampling.temperature).softmax(-1)
    # Of a trained model the likeliest few nearly always have top_p together, and finding those
    # takes 7 ms where sorting everything takes 88, for (16, 32,000) on 2 CPU cores.
    for k in (256, p.shape[-1]):
        likeliest, tokens = p.topk(min(k, p.shape[-1]))
        total = likeliest.double().cumsum(-1)
        # Where all tokens are allowed, it is enough to have those that u may choose.
        if (total[:, -1:] > (u if sampling.top_p == 1 else sampling.top_p)).all():
            break
    # Tokens are allowed up to the first at which the probability of all so far reaches top_p.
    allowed = (total - likeliest < sampling.top_p).sum(-1, keepdim=True)
    mass = total.gather(1, allowed - 1) if sampling.top_p < 1 else 1.0
    rank = torch.searchsorted(total, u * mass, right=True).minimum(allowed - 1)
    return tokens.gather(1, rank)[:, 0]


def complete(text, stops):
    """How much of an unfinished answer may be shown: no half of a character or of a stop string."""
    text = text.rstrip("\ufffd")  # bytes of a character that is not whole
    halves = (k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
    return len(text) - max(halves, default=0)
