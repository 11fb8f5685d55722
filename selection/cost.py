"""What scoring a data set costs, in FLOPs: counted before anything is computed.

326,154 conversations of 1,097 tokens, all that Tulu 2 was trained on, by a 7B: rds 4.7e18, which
is 3.3 hours of an H100 at 400 TFLOP/s; two epochs of training take six times as much.
"""

from collections.abc import Collection

from model import LlamaConfig
from training.update import model_flops


def scoring_flops(
    model_config: LlamaConfig, method: str, lengths: Collection[int], trained: int, less=None
) -> int:
    """FLOPs of scoring documents of these lengths (tokens), `trained` of which are trained.

    A forward pass is a third of `model_flops`, without the head for rds. With frozen weights a
    backward pass costs as much as a forward pass. less: the flags of prune.py, for its checkpoints,
    its warm-up and the projection, of 2 d D for a gradient of D numbers.
    """
    forward = model_flops(model_config, lengths, 0 if method == "rds" else trained) // 3
    if method == "ifd":  # the answers again, alone
        share = trained / sum(lengths)
        return forward + model_flops(model_config, [n * share for n in lengths], trained) // 3
    if method != "less":
        return forward
    passes = less.warmup_epochs * (1 + less.warmup_share)
    numbers = probe_numbers(model_config, less.probe_rank)
    projected = less.warmup_epochs * len(lengths) * 2 * less.projection * numbers
    return round(2 * forward * passes) + projected


def probe_numbers(config: LlamaConfig, rank: int) -> int:
    """D: parameters of the probes of all projections (selection/probe.py)."""
    E, F = config.hidden_size, config.intermediate_size
    H, Hk = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    shapes = [(H, E), (Hk, E), (Hk, E), (E, H), (F, E), (F, E), (E, F)]  # (N, K)
    return config.num_hidden_layers * sum(N * min(rank, N, K) for N, K in shapes)
