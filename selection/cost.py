"""What scoring a data set costs, in FLOPs: counted before anything is computed.

326,154 conversations of 1,097 tokens, all that Tulu 2 was trained on, by a 7B: rds 4.7e18, which
is 3.3 hours of an H100 at 400 TFLOP/s; less 4.4e19, 31 hours. Two epochs of training take 2.9e19.
"""

from collections.abc import Collection

from model import LlamaConfig
from training.update import model_flops


def scoring_flops(
    model_config: LlamaConfig, method: str, lengths: Collection[int], trained: int, less=None
) -> int:
    """FLOPs of scoring documents of these lengths (tokens), `trained` of which are trained.

    A forward pass is a third of `model_flops`, without the head for rds. With frozen weights a
    backward pass costs as much as a forward pass. less: `LessFlags`, for the checkpoints, the
    warm-up, the adapters and the projection, which is 2 d D for a gradient of D numbers.
    """
    forward = model_flops(model_config, lengths, 0 if method == "rds" else trained) // 3
    if method == "ifd":  # the answers again, alone
        share = trained / sum(lengths)
        return forward + model_flops(model_config, [n * share for n in lengths], trained) // 3
    if method != "less":
        return forward
    numbers = adapter_numbers(model_config, less.lora_rank)
    both_passes = 2 * forward + 6 * numbers * int(sum(lengths))
    projected = len(lengths) * 2 * less.projection * numbers
    return round(less.warmup_epochs * ((1 + less.warmup_share) * both_passes + projected))


def adapter_numbers(config: LlamaConfig, rank: int) -> int:
    """D: numbers of the adapters of this rank on q_proj, k_proj, v_proj and o_proj."""
    E, H = config.hidden_size, config.num_attention_heads * config.head_dim
    Hk = config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * rank * (2 * (E + H) + 2 * (E + Hk))
