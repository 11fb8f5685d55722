"""Byte-pair encoding by SentencePiece's scores, and by the list of merges in a tokenizer.json.

SentencePiece merges the adjacent pair whose piece has the best score, the leftmost of equal ones.
The tokenizers package merges the pair that stands first in its list. Both give the same ids where
the list is in the order of the scores and pieces of equal score cannot compete. What follows finds
that list, and says where there is none.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Sequence

from sentencepiece import SentencePieceProcessor

from tokens.protobuf import fields

# Types of a piece in a SentencePiece model. USER_DEFINED: found in the text before any merge.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def piece_types(model: bytes) -> list[int]:
    """The type of each piece of a serialised SentencePiece model, in the order of the ids."""
    pieces = [value for number, value in fields(model) if number == 1 and isinstance(value, bytes)]
    kinds = [dict(fields(piece)).get(3) for piece in pieces]
    return [kind if kind in range(1, 7) else NORMAL for kind in kinds]


def piece_scores(sp: SentencePieceProcessor) -> dict[str, float]:
    """`{piece: score}` of the pieces that stand for a text of their own."""
    return {
        sp.id_to_piece(i): sp.get_score(i)
        for i in range(sp.vocab_size())
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))
    }


def splits(pieces: Collection[str]) -> list[tuple[str, str]]:
    """`(left, right)` of every way to make one of the pieces from two others."""
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def merges_in_order(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json that stand for these `{piece: score}`.

    Raises `ValueError` with pieces whose equal score no list of merges can stand for.
    """
    # Runs of spaces tie. SentencePiece merges the leftmost pair, so the left part grows first.
    merges = sorted(
        splits(scores),
        key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])),
    )
    pairs_of, ties = defaultdict(list), defaultdict(set)
    for left, right in merges:
        pairs_of[scores[left + right]].append((left, right))
        ties[scores[left + right]].add(left + right)
    for score, pieces in ties.items():
        if len(pieces) > 1:
            pairs = pairs_of[score]
            rivals = competition(pairs, pieces, [m for m in merges if scores["".join(m)] >= score])
            if rivals:
                raise ValueError(f"pieces {rivals[0]!r} and {rivals[1]!r} of equal score")
    return merges


def competition(
    pairs: list[tuple[str, str]], pieces: set[str], as_good: list[tuple[str, str]]
) -> tuple[str, str] | None:
    """Two pieces of one score between which an order decides how some text is split, or None.

    pairs: the merges of this score, in order; pieces: what they make; as_good: all merges of this
    score or a better one. Two merges compete where both need the part in the middle, b of "a b c",
    or where a piece that one of them has made takes, at once, what the other needs. Stricter than
    necessary, except for the runs of one character, which are tried.
    """
    begins, ends = defaultdict(set), defaultdict(set)
    for pair in pairs:
        begins[pair[0]].add(pair)
        ends[pair[1]].add(pair)
    if len(set().union(*pieces)) == 1:
        character, longest = min(pieces)[0], max(map(len, pieces))
        ranks, ties = {pair: rank for rank, pair in enumerate(pairs)}, dict.fromkeys(pairs, 0)
        for length in range(2, 4 * longest):
            if merged(character * length, ranks) != merged(character * length, ties):
                return min(pieces), max(pieces)
    else:
        for pair in pairs:
            for other in begins[pair[1]] - {pair}:
                return "".join(pair), "".join(other)
    grown = {piece: piece for piece in pieces}  # from which of the pieces
    for left, right in sorted(as_good, key=lambda pair: len(pair[0] + pair[1])):
        maker = grown.get(left) or grown.get(right)
        if maker is None:
            continue
        grown.setdefault(left + right, maker)
        if (left, right) not in begins[left]:
            for other in (left in grown and begins[right]) or (right in grown and ends[left]) or ():
                return maker, "".join(other)
    return None


def merged(symbols: Sequence[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces that merging makes of a text's characters: lowest rank first, then leftmost."""
    pieces, following = list(symbols), list(range(1, len(symbols) + 1))
    before = list(range(-1, len(symbols) - 1))
    heap = []

    def propose(left):
        right = following[left] if left >= 0 else len(pieces)
        if right < len(pieces) and (pieces[left], pieces[right]) in ranks:
            pair = pieces[left], pieces[right]
            heapq.heappush(heap, (ranks[pair], left, right, pair))

    for position in range(len(pieces)):
        propose(position)
    while heap:
        _, left, right, pair = heapq.heappop(heap)
        if following[left] != right or (pieces[left], pieces[right]) != pair:
            continue  # one of the two has been merged meanwhile
        pieces[left], pieces[right] = pair[0] + pair[1], None
        following[left] = following[right]
        if following[left] < len(pieces):
            before[following[left]] = left
        propose(before[left])
        propose(left)
    return [piece for piece in pieces if piece is not None]
