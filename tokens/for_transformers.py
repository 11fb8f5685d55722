"""The tokenizer files with which transformers, vLLM and the tokenizers package give our ids.

They are written beside every model that training saves; training itself never reads them.
"""

import json
import shutil
from pathlib import Path

from program.errors import InputError
from tokens.tokenizer import piece_scores, tokenizer_config

# The chat format of tokenizer.py for transformers and vLLM. `{space}` is one space unless the
# tokenizer is `legacy`: without it, a literal BOS removes the "▁" before the first word.
CHAT_TEMPLATE = (
    "{{ bos_token }}{space}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'].strip() + eos_token }}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n' }}{% endif %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'].strip() + '\\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def save_tokenizer(tokenizer, source, folder):
    """Write tokenizer.model, tokenizer.json, and tokenizer_config.json with the chat template.

    source: the folder that `tokenizer` was read from; other settings in its config are kept.
    """
    source, folder = Path(source), Path(folder)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    special = {
        "bos_token": tokenizer.sp.id_to_piece(tokenizer.bos_id),
        "eos_token": tokenizer.sp.id_to_piece(tokenizer.eos_id),
        "unk_token": tokenizer.sp.id_to_piece(tokenizer.sp.unk_id()),
    }
    config = tokenizer_config(source) | special
    config |= {
        # This class keeps SentencePiece's ids; Code Llama's own adds tokens for infilling.
        "tokenizer_class": "LlamaTokenizer",
        "legacy": tokenizer.legacy,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "chat_template": CHAT_TEMPLATE.replace("{space}", "" if tokenizer.legacy else " "),
    }
    config.pop("auto_map", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        json.dumps(fast_tokenizer(tokenizer, source / "tokenizer.json"), ensure_ascii=False),
        encoding="utf-8",
    )


def fast_tokenizer(tokenizer, path):
    """The content of tokenizer.json: the base's, with its merges in order, or a new one.

    path: the base's, which may be absent; raises `InputError` where it is of another kind.
    """
    scores = piece_scores(tokenizer.sp)
    splits = [
        [piece[:cut], piece[cut:]]
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges = sorted(splits, key=lambda pair: merge_rank(pair, scores))
    if path.is_file():
        return base_tokenizer_json(path, scores, merges)
    return new_tokenizer_json(tokenizer, merges)


def base_tokenizer_json(path, scores, merges):
    """The base's tokenizer.json, with `merges` in place of its own where theirs are out of order.

    Only the scores have to be in order. Llama 2's own file ranks the splits of one piece in another
    order than `merge_rank`, which changes no id; transformers 5 ranks by id, which does.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        given = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
        ranks = [merge_rank(pair, scores)[0] for pair in given]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a BPE tokenizer of Llama's kind ({error!r})") from None
    if ranks != sorted(ranks) or len(given) != len(merges):
        content["model"]["merges"] = merges
    return content


def new_tokenizer_json(tokenizer, merges):
    """A tokenizer.json made from tokenizer.model: its pieces, and the steps of SentencePiece."""
    sp, bos = tokenizer.sp, tokenizer.sp.id_to_piece(tokenizer.bos_id)
    # Spaces become "▁". Under `legacy` every segment between special tokens gets one in front,
    # otherwise only the first.
    pre_tokenizer = {
        "type": "Metaspace",
        "replacement": "▁",
        "split": False,
        "prepend_scheme": "always" if tokenizer.legacy else "first",
    }
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": sp.id_to_piece(i), "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i in sorted({sp.unk_id(), tokenizer.bos_id, tokenizer.eos_id})
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": sp.id_to_piece(sp.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {sp.id_to_piece(i): i for i in range(sp.vocab_size())},
            "merges": merges,
        },
    }


def merge_rank(pair, scores):
    """Sort key of a merge: SentencePiece merges the pair whose piece has the best score.

    Runs of spaces tie. SentencePiece then merges the leftmost pair, so the left part grows first.
    """
    left, right = pair
    return -scores.get(left + right, -float("inf")), -len(left), -len(right)
