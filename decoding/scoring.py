"""The likelihood of given answers: which option of a multiple-choice question a model prefers.

Called by generator.py, for evaluate.py's benchmarks.
"""

from decoding.cached_model import CachedModel, how_many_fit


def option_logps(
    model: CachedModel, prompts: list[list[int]], options: list[list[list[int]]]
) -> list[list[float]]:
    """log p(option | prompt), summed over the option's tokens, for each option of each prompt.

    model: a `CachedModel`. A prompt runs once, and all its options go on from it.
    """
    logps = [[0.0] * len(of_prompt) for of_prompt in options]  # an empty option is certain: 0
    longest = [max(map(len, of_prompt), default=0) for of_prompt in options]
    tokens = (len(p) + n for p, n in zip(prompts, longest, strict=True))
    model.make_room(max(tokens, default=0), len(prompts))
    shared = model.prefill_shared(prompts)
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first
    while waiting:
        n = how_many_fit([len(prompts[i]) for i in waiting[: model.slots]], model.slots)
        batch, waiting = waiting[:n], waiting[n:]
        logits = model.prefill([prompts[i] for i in batch], shared=shared)  # (B, V)
        first_logps = logits.log_softmax(-1)
        scored = [  # (slot, prompt, option) of options with a token
            (slot, i, k) for slot, i in enumerate(batch) for k, o in enumerate(options[i]) if o
        ]
        firsts = model.tensor([options[i][k][0] for _, i, k in scored])
        of_firsts = first_logps[model.tensor([slot for slot, *_ in scored]), firsts].tolist()
        for (_, i, k), logp in zip(scored, of_firsts, strict=True):
            logps[i][k] = logp
        longer = [(slot, i, k) for slot, i, k in scored if len(options[i][k]) > 1]
        while longer:
            n = how_many_fit([len(options[i][k]) for _, i, k in longer[: model.slots]], model.slots)
            part, longer = longer[:n], longer[n:]
            slots, starts = [slot for slot, *_ in part], [len(prompts[i]) for _, i, _ in part]
            nll = model.nll(slots, starts, [options[i][k] for _, i, k in part])
            for (_, i, k), rest in zip(part, nll, strict=True):
                logps[i][k] -= rest
    return logps
