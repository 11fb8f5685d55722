"""Causal attention inside each document of a packed row: on CPU through torch, on CUDA in Triton.

The one call of model.py's `Attention`: queries, keys and values of a row of documents laid end to
end go in, the heads' outputs come out. Grouped-query heads share their key/value head as it lies in
memory; nothing is repeated.

Shapes: T tokens of the row, H query heads, Hk key/value heads (H a multiple of Hk), D head size.
"""

import math
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention


def attention(q, k, v, doc_start, layout=None):
    """softmax(q kᵀ / sqrt(D)) v, where token i sees j with doc_start[i] <= j <= i.

    q (T, H, D), k and v (T, Hk, D), doc_start (T,) int32 -> out (T, H, D) in the dtype of q. The
    softmax is in fp32. `layout` is `attention_layout(doc_start)`, made once for all layers.
    """
    if layout is None:
        layout = attention_layout(doc_start)
    return attention_cpu(q, k, v, layout)


def attention_layout(doc_start):
    """What the implementation of this device needs to know of doc_start: the documents' lengths."""
    starts = (doc_start == torch.arange(len(doc_start))).nonzero()[:, 0].tolist()
    # An empty row is one document of no tokens, so that q, k and v still get their gradients.
    return [end - start for start, end in pairwise([*starts, len(doc_start)])] or [0]


def attention_reference(q, k, v, doc_start):
    """The same, from the definition: a (T, T) mask and every key/value head repeated."""
    (T, H, D), Hk = q.shape, k.shape[1]
    i = torch.arange(T, device=q.device)
    seen = (doc_start[:, None] <= i) & (i <= i[:, None])  # (T, T)
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(exact).repeat_interleave(H // Hk, dim=1) for x in (k, v))  # (T, H, D)
    scores = torch.einsum("ihd,jhd->hij", q.to(exact), k) / math.sqrt(D)
    p = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)  # (H, T, T)
    return torch.einsum("hij,jhd->ihd", p, v).to(q.dtype)


def attention_cpu(q, k, v, lengths):
    """One call of torch's blocked CPU attention per document.

    `split`, not slices: the backward of a slice fills a tensor of the whole row per document. Tried
    and no faster where training runs (documents of about 190 tokens): documents of similar length
    padded into one call, and the repeated key/value heads made once for the row.
    """
    documents = []
    for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads_first = (x.transpose(0, 1)[None] for x in one)  # (1, H or Hk, length, D)
        out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        documents.append(out[0].transpose(0, 1))
    return torch.cat(documents)
