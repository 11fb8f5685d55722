"""The adapters' dropout: each draw is a function of the seed, the update and what is dropped.

A draw for feature k of token t, in adapter m, is

    a_t · b_mk  mod 2³²,   dropped where its share of 2³² is below the flag's

with odd hashes a_t of (seed, update, all tokens of the document, the token's position) and b_mk of
(m, k): multiplicative hashing (Dietzfelbinger et al. 1997). No generator has a state. So a run that
was interrupted draws what it would have drawn; recomputation draws the same again; and neither
rows nor ranks nor a document's neighbours change a draw. (Two equal documents in one update share
theirs. A pair's two answers in DPO have draws of their own.)
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

FACTOR = -7046029254386353131  # 2⁶⁴ divided by the golden ratio, as a signed number


class Dropout:
    """What all adapters of a model share: the draws of the row that is in work."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.update = 0  # set by the loop
        self.token_keys = None  # a_t (T,) int32 of the row in work

    def listen(self, decoder: nn.Module) -> None:
        """Make a `Decoder` give out its tokens before each forward pass."""
        if self.share:
            decoder.forward = functools.partial(self.begin_row, decoder.forward)

    def begin_row(
        self, forward: Callable, input_ids: torch.Tensor, positions: torch.Tensor,
        attends: list[Callable],
    ) -> torch.Tensor:  # fmt: skip
        """The decoder's forward pass, with a_t made first."""
        if torch.is_grad_enabled():
            rows = torch.arange(len(positions), device=positions.device)
            document = rows - positions  # of each token, the row's token that is its number
            contents = torch.zeros_like(input_ids)
            contents.index_add_(0, document, mixed(mixed(input_ids) + positions))
            key = mixed(torch.tensor(self.seed)) + self.update
            # `key` stays on the CPU: it adds to the others as a number does, without a copy that
            # waits for the GPU.
            keys = mixed(mixed(contents[document] + positions) + mixed(key))
            self.token_keys = odd(keys)
        return forward(input_ids, positions, attends)

    def feature_keys(self, number: int, features: int) -> torch.Tensor:
        """b_mk (features,) int32 of adapter m = `number`."""
        return odd(mixed(mixed(torch.tensor(number)) + torch.arange(features)))

    def drop(self, x: torch.Tensor, feature_keys: torch.Tensor) -> torch.Tensor:
        """x (T, K) with a share of its elements zero and the others scaled up by what is missing.

        Only where gradients are recorded: not in an evaluation, and not for DPO's reference.
        """
        if not self.share or not torch.is_grad_enabled():
            return x
        draws = self.token_keys[:, None] * feature_keys  # (T, K), uniform over int32
        dropped = draws < int(self.share * 2**32) - 2**31
        return x.masked_fill(dropped, 0.0) * (1 / (1 - self.share))


def mixed(x: torch.Tensor) -> torch.Tensor:
    """A hash of int64 numbers, each on its own: multiplied, folded onto itself, and again."""
    for _ in range(2):
        x = x * FACTOR
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x * FACTOR


def odd(x: torch.Tensor) -> torch.Tensor:
    """The high half of int64 numbers, made odd, as int32."""
    return (x >> 32).int() | 1
