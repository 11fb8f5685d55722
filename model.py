"""LLaMA 2 in plain PyTorch: a packed row of documents in, losses or logits of chosen tokens out.

Touvron et al. 2023 (arXiv 2307.09288), section 2.2: pre-normalisation with RMSNorm, rotary position
embedding, grouped-query attention, SwiGLU. The names of modules and parameters, and the half-split
rotary layout, are Hugging Face's, so that its safetensors load without a name map.

There is no batch axis and no padding. One forward pass takes one row: documents (conversations)
laid end to end, with `doc_start` telling every token where its own document begins.

Shapes, here and in every other file:
    T  tokens of a packed row        E  hidden size           F  width of the MLP
    H  query heads                   Hk key/value heads       D  size of a head
    V  vocabulary                    N  tokens that are predicted (trained), or sequences

The sizes that Tulu 2 and Code Tulu 2 start from; in all of them D is 128 and rms_norm_eps 1e-5:

                      layers      E       F    H  Hk       V  rope_theta      parameters
    Llama 2 7B            32  4,096  11,008   32  32  32,000         1e4   6,738,415,616
    Llama 2 13B           40  5,120  13,824   40  40  32,000         1e4  13,015,864,320
    Llama 2 70B           80  8,192  28,672   64   8  32,000         1e4  68,976,648,192
    Code Llama 34B        48  8,192  22,016   64   8  32,000         1e6  33,743,970,304

Code Llama 7B and 13B: Llama 2's, V 32,016, rope_theta 1e6. Grouped-query attention where Hk < H.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention, document_ends
from kernels.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture; the fields are those of a Hugging Face Llama folder's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int = 2048  # the context in tokens, used by decoding/


class Llama(nn.Module):
    """The whole network; `lm_head` is None where the head is tied to the embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, doc_start: Tensor, predict: Tensor,
                labels: Tensor | None = None, uniform_gradient: bool = False,
                positions: Tensor | None = None, doc_end: Tensor | None = None,
                tiles: Tensor | None = None) -> Tensor:  # fmt: skip
        """Losses, or logits, of the tokens that follow the places `predict` of a row.

        input_ids (T,) int64, doc_start (T,) int32, predict (N,) int64. Without labels: logits
        (N, V) fp32. With labels (N,) int64: their negative log-likelihood (N,) fp32;
        `uniform_gradient=True` promises that the loss is a multiple of its sum. positions, doc_end
        and tiles are `pack_row`'s; without them the row holds no pairs.

        The head sees only `predict`: prompts, which are not trained, never reach it. It is applied
        in here, not by the caller, because FSDP2 gathers its weight for this call alone.
        """
        if positions is None:
            positions = torch.arange(len(input_ids), device=doc_start.device) - doc_start
            doc_end = document_ends(doc_start)
        attend = functools.partial(attention, doc_start=doc_start, doc_end=doc_end, tiles=tiles)
        hidden = self.model(input_ids, positions, [attend] * len(self.model.layers))
        return self.head(hidden[predict], labels, uniform_gradient)

    def head(self, hidden: Tensor, labels: Tensor | None = None,
             uniform_gradient: bool = False) -> Tensor:  # fmt: skip
        """Losses (N,) of labels (N,), or without labels logits (N, V), from hidden (N, E)."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if labels is None:
            return F.linear(hidden, weight).float()
        return linear_cross_entropy(hidden, weight, labels, uniform_gradient=uniform_gradient)


class Decoder(nn.Module):
    """Embedding, the blocks, and the last normalisation: hidden states (T, E) of a row.

    positions (T,) count from the start of a token's document. attends: a function (q, k, v) -> out
    for each layer, by which its tokens attend; shapes as in kernels/attention.py.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, attends: list[Callable]) -> Tensor:
        x = self.embed_tokens(input_ids)  # (T, E)
        cos, sin = rotary_angles(positions, self.config, x.dtype)
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, cos, sin, attend)
        return self.norm(x)


class Block(nn.Module):
    """One transformer block: attention, then the MLP, each on a normalised copy of the stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Self-attention: H query heads share Hk key/value heads, and `attend` says who sees whom."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(E, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(E, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(E, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, E, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, Hk, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, Hk, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in fp32, then times a weight (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotary_angles(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """cos and sin (T, 1, D) of position · theta^(-2i/D), in fp32 (Su et al. 2021, eq. 15).

    The D/2 angles come twice, one copy after the other: Hugging Face's layout pairs element i with
    i + D/2, the paper and Meta's weights 2i with 2i + 1.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=positions.device) / D
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x (T, heads, D) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
