"""A record becomes token ids and a loss mask: one sequence for SFT, two for DPO.

token_cache.py calls `encode_conversation` (SFT) or `encode_pair` (DPO) on each record of the data.
Both raise `ValueError` for a bad record; the caller adds file and line. What a record may look
like is shapes.py's.
"""

from tokens.shapes import conversation, pair, texts
from tokens.tokenizer import Tokenizer


def encode_conversation(record: dict, tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """`[(ids, trained)]` of a record of one of the `SHAPES`."""
    return [tokenizer.encode(conversation(record))]


def encode_pair(record: dict, tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """`[chosen, rejected]`, each `(ids, trained)`, of a record `{"chosen": […], "rejected": […]}`.

    Both are lists of messages, as in UltraFeedback; only the last message, the answer, is trained.
    The messages before it must be the same in both.
    """
    sides = pair(record)
    prompts = [texts(messages[:-1]) for messages in sides]
    if prompts[0] != prompts[1]:
        raise ValueError(
            "chosen and rejected answer different prompts, expected the same messages "
            "before the last"
        )
    # The prompt ends in a line feed, which never merges with what follows: its ids are a prefix of
    # the conversation's.
    answer = len(tokenizer.prompt(sides[0][:-1]))
    encoded = [tokenizer.encode(messages) for messages in sides]
    return [(ids, [False] * answer + trained[answer:]) for ids, trained in encoded]
