"""Attention on CPU: what kernels/attention.py defines, through torch's own kernel."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention_tiles import branches


@torch.compiler.disable  # it would be compiled again for the lengths of every row
def attention_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor,
                  doc_end: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """One call of torch's blocked CPU attention per document, and per branch that has holes.

    A pair takes two: prompt and chosen are like a document, and rejected is the end of another one.
    `split`, not slices: the backward of a slice fills a tensor as long as the row, per document.
    Padding documents of similar length into one call was no faster at about 190 tokens each.
    """
    first, end, paths = branches(doc_start.numpy(), doc_end.numpy())
    calls = []  # branches of queries, branches of keys; the queries are the last of the keys
    for branch, path in enumerate(paths):
        if path[:-1] and path[-2] == branch - 1:  # goes on where the last call ends
            calls[-1] = calls[-1][0] + [branch], path
        else:
            calls.append(([branch], path))
    lengths = (end - first).tolist()
    if not lengths:  # an empty row: one document, so that q, k and v get their gradients
        lengths, calls = [0], [([0], [0])]
    q, k, v = (x.split(lengths) for x in (q, k, v))
    outs = []
    for queries, keys in calls:
        of_parts = ((q, queries), (k, keys), (v, keys))
        tensors = (x[b[0]] if len(b) == 1 else torch.cat([x[i] for i in b]) for x, b in of_parts)
        q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in tensors)  # (1, H or Hk, tokens, D)
        n, m, mask = q_b.shape[2], k_b.shape[2], None
        if n < m:  # query i is token i + m - n of the keys
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        out = scaled_dot_product_attention(q_b, k_b, v_b, mask, is_causal=n == m, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
