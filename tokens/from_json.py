"""A SentencePiece model made from a tokenizer.json of Llama's kind.

transformers 5, and TRL with it, saves a Llama without tokenizer.model. The pieces, their ids and
the order of their merges stand in tokenizer.json; the model made of them is used only where it
splits texts as that file does, and is written beside the weights as tokenizer.model.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from program.errors import InputError
from program.files import read_object
from tokens import bpe
from tokens.folder import token_text
from tokens.protobuf import field

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def model_from_json(path: Path, config: dict) -> bytes:
    """The bytes of a tokenizer.model for the tokenizer.json `path`.

    config: the content of tokenizer_config.json, which names BOS and EOS; where it does not, or
    the vocabulary lacks them, they are `<s>` and `</s>`. Raises `InputError` for a tokenizer of
    another kind, and for one that no SentencePiece model equals.
    """
    content = read_object(path)
    try:
        check_steps(content)
        pieces = pieces_by_id(content)
        merges = read_merges(content)
        model = write_model(pieces, merges, content, config)
        prove_equal(model, pieces, merges)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise InputError(
            f"{path}: {reason}, expected a tokenizer like Llama's (BPE, byte fallback, spaces as "
            "'▁'); copy tokenizer.model from the base model into this folder"
        ) from None
    return model


def check_steps(content: dict) -> None:
    """Raise `ValueError` unless the steps before and around the merges are Llama's."""
    model = content["model"]
    if content.get("version", "1.0") != "1.0":
        raise ValueError(f"version is {content['version']!r}")
    for name, expected in (
        ("type", ("BPE", None)),
        ("byte_fallback", (True,)),
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("ignore_merges", (False, None)),
    ):
        if model.get(name) not in expected:
            raise ValueError(f"model.{name} is {model.get(name)!r}")
    # Spaces become "▁", and one more stands at the beginning: in one of two ways.
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    by_normalizer = {"type": "Sequence", "normalizers": [prepend, replace]}
    if pre_tokenizer is None and normalizer == by_normalizer:
        return
    if normalizer is not None:
        raise ValueError(f"normalizer is {json.dumps(normalizer)[:80]}")
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
    for scheme in ("first", "always"):
        if pre_tokenizer == metaspace | {"prepend_scheme": scheme}:
            return
    raise ValueError(f"pre_tokenizer is {json.dumps(pre_tokenizer)[:80]}")


def pieces_by_id(content: dict) -> list[str]:
    """Every piece of the vocabulary, in the order of the ids.

    Ids that the vocabulary leaves out are the added tokens'; those beyond it are not of the model.
    """
    pieces = {i: piece for piece, i in content["model"]["vocab"].items()}
    if len(pieces) != len(content["model"]["vocab"]) or not pieces:
        raise ValueError("model.vocab gives two pieces one id")
    for token in content.get("added_tokens") or []:
        flags = [token[name] for name in ("special", "lstrip", "rstrip", "single_word")]
        if not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"added_tokens holds {token}")
        if token["id"] < max(pieces):
            pieces.setdefault(token["id"], token["content"])
    if set(pieces) != set(range(len(pieces))) or len(set(pieces.values())) != len(pieces):
        raise ValueError(f"model.vocab does not give the ids 0 to {len(pieces) - 1} once each")
    return [pieces[i] for i in range(len(pieces))]


def read_merges(content: dict) -> list[tuple[str, str]]:
    """The merges, in their order, as pairs; older files hold each as one text."""
    given = content["model"]["merges"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in given]
    parts = [part for pair in merges for part in pair]
    fine = all(len(pair) == 2 for pair in merges) and all(isinstance(p, str) and p for p in parts)
    if not fine or len(set(merges)) < len(merges):
        raise ValueError("model.merges holds something else than different pairs of pieces")
    return merges


def write_model(
    pieces: list[str], merges: list[tuple[str, str]], content: dict, config: dict
) -> bytes:
    """The model, serialised. Source: sentencepiece_model.proto, its fields and their numbers."""
    scores, parts = scores_of(merges), {part for pair in merges for part in pair}
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    names = {"unk": content["model"].get("unk_token") or "<unk>"}
    for name, usual in (("bos", "<s>"), ("eos", "</s>")):
        text = token_text(config.get(f"{name}_token"))
        names[name] = text if text in pieces else usual
    ids = {name: pieces.index(piece) for name, piece in names.items()}
    if len(set(ids.values())) < 3:
        raise ValueError(f"special tokens are {names}")

    def type_of(piece):
        if piece == names["unk"]:
            return bpe.UNKNOWN
        if piece in names.values():
            return bpe.CONTROL
        if BYTE_PIECE.fullmatch(piece):
            return bpe.BYTE
        if piece in scores or piece in parts or len(piece) == 1:
            return bpe.NORMAL
        # No merge makes it: it is found in the text as it is, or never.
        plain = piece in added and not any(
            added[piece].get(name) for name in ("special", "lstrip", "rstrip", "single_word")
        )
        return bpe.USER_DEFINED if plain else bpe.CONTROL

    vocabulary = b"".join(
        field(1, field(1, p) + field(2, float(scores.get(p, 0))) + field(3, type_of(p)))
        for p in pieces
    )
    trainer = field(3, 2) + field(4, len(pieces)) + field(24, False) + field(35, True)  # 2: BPE
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos")):
        trainer += field(number, ids[name]) + field(number + 5, names[name])
    normalizer = field(1, "identity") + field(3, True) + field(4, False) + field(5, True)
    return vocabulary + field(2, trainer) + field(3, normalizer)


def scores_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """`{piece: score}`: the merges of a better score come first.

    The merges of one piece share a score, so pieces whose merges are interleaved share one, too.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    scores, score, end = {}, 0, -1
    for rank, (left, right) in enumerate(merges):
        if rank > end:
            score -= 1
        end = max(end, last[left + right])
        scores[left + right] = score
    return scores


def prove_equal(model: bytes, pieces: list[str], merges: list[tuple[str, str]]) -> None:
    """Raise `ValueError` unless the model splits texts as these merges do.

    All merges that the model can do must be there, and no others. What is left is the order: it is
    tried on every piece between its neighbours in the vocabulary, and on the runs in which two
    merges of one piece compete ("=", "==", "===" or "aba", "ab").
    """
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model)
    types = bpe.piece_types(model)
    scores = {p: sp.get_score(i) for i, p in enumerate(pieces) if types[i] == bpe.NORMAL}
    possible = bpe.merges_in_order(scores)
    if surplus := set(possible) ^ set(merges):
        raise ValueError(f"model.merges and model.vocab differ in {sorted(surplus)[0]}")
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    user_defined = [p for i, p in enumerate(pieces) if types[i] == bpe.USER_DEFINED]
    for text in sample_texts(list(scores), ranks):
        if any(piece in text for piece in user_defined):
            continue
        if sp.encode(text, out_type=str) != bpe.merged("▁" + text, ranks):
            raise ValueError(f"its merges split {text!r} in another way than SentencePiece")


def sample_texts(pieces: list[str], ranks: dict[tuple[str, str], int]) -> Iterator[str]:
    """Texts to try an order of merges on: neighbours in the vocabulary, and what repeats itself."""
    step = 4 * (1 + len(pieces) // 8000)
    yield from ("".join(pieces[i : i + 4]) for i in range(0, len(pieces), step))
    longest = {}  # by the shortest period of the piece
    for left, right in ranks:
        # Where xy = yz, "xyz" can be merged in two ways; it repeats itself after len(x).
        piece = left + right
        if left != right and (right, piece[len(right) :]) in ranks and piece.startswith(right):
            period = left[: (left + left).find(left, 1)]
            longest[period] = max(longest.get(period, 0), len(piece))
    for period, length in longest.items():
        text = period * (3 * length)
        for size in range(2, 3 * length):
            yield from (text[start : start + size] for start in range(len(period)))
