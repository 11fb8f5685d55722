"""The tokenizer files with which transformers, vLLM and the tokenizers package give our ids.

They are written beside every model that training saves; training itself never reads them.

    python -m tokens.for_transformers OUT > marked.jinja        the template for TRL, see `marked`
"""

import json
import sys
from pathlib import Path

from program.errors import InputError, reported
from program.files import read_object
from tokens import bpe
from tokens.folder import named_tokens, token_text, tokenizer_config
from tokens.tokenizer import Tokenizer

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


# Of the base's tokenizer_config.json, what changes no id.
KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")


def check_tokenizer(tokenizer: Tokenizer, source: str | Path) -> list[str]:
    """The base's tokens that are plain text here, after a check that our ids can be served.

    source: the folder that `tokenizer` was read from. Raises `InputError` where no tokenizer.json
    gives the ids of the SentencePiece model, or the base's says that the vocabulary is larger.
    """
    pieces = tokenizer_json(tokenizer)["model"]["vocab"]
    named, path = named_tokens(source), Path(source) / "tokenizer.json"
    if path.is_file() and path != tokenizer.path:
        check_same_vocabulary(pieces, path, named)
    special = [token["content"] for token in added_tokens(tokenizer)]
    return [text for text in named if text not in special]


def check_same_vocabulary(pieces: dict[str, int], path: Path, named: list[str]) -> None:
    """Raise `InputError` unless the base's tokenizer.json gives the same ids to the same pieces."""
    model = read_object(path).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not isinstance(model.get("merges"), list):
        raise InputError(f"{path}: not a BPE tokenizer, expected model.vocab and model.merges")
    others = {piece: i for piece, i in vocabulary.items() if pieces.get(piece) != i}
    unknown = [piece for piece in others if piece in pieces or piece not in named]
    if unknown:
        raise InputError(
            f"{path}: {len(unknown):,} pieces, {unknown[0]!r} for one (id {others[unknown[0]]}), "
            "are not in tokenizer.model or have another id there, expected the same vocabulary"
        )


def save_tokenizer(
    tokenizer: Tokenizer, source: str | Path, folder: str | Path, longest: int = 0
) -> None:
    """Write tokenizer.model, tokenizer.json, and tokenizer_config.json with the chat template.

    source: the folder that `tokenizer` was read from. Of its tokenizer_config.json only `KEPT` is
    kept. longest: model_max_length is at least so many tokens.
    """
    folder, base, sp = Path(folder), tokenizer_config(source), tokenizer.sp
    config = {name: base[name] for name in KEPT if name in base}
    if isinstance(config.get("model_max_length"), int | float):
        config["model_max_length"] = max(config["model_max_length"], int(longest))
    special = {
        "bos_token": sp.id_to_piece(tokenizer.bos_id),
        "eos_token": sp.id_to_piece(tokenizer.eos_id),
        "unk_token": sp.id_to_piece(sp.unk_id()),
    }
    special["pad_token"] = pad_token(tokenizer, source)
    template = CHAT_TEMPLATE.replace("{space}", "" if tokenizer.legacy else " ")
    config |= special | {
        # This class keeps SentencePiece's ids; Code Llama's own adds tokens for infilling. It puts
        # "▁" before a text by itself; told to, transformers 4 would ask for protobuf.
        "tokenizer_class": "LlamaTokenizer",
        "legacy": tokenizer.legacy,
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": template,
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    content = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")


def pad_token(tokenizer: Tokenizer, source: str | Path) -> str:
    """The base's pad token if that is BOS or EOS, else the unknown token, as EasyLM padded.

    A token of its own would be one id in a text that was trained as several.
    """
    pad, sp = token_text(tokenizer_config(source).get("pad_token")), tokenizer.sp
    own = [sp.id_to_piece(i) for i in (sp.unk_id(), tokenizer.bos_id, tokenizer.eos_id)]
    return pad if pad in own else own[0]


def marked(template: str) -> str:
    """The chat template with marks around each answer and its EOS; it renders the same text.

    TRL's `assistant_only_loss` needs them (`chat_template_path` takes the file). They are not in
    the template that is saved, because the tag is transformers' own: plain jinja2 refuses it, and
    so do TGI before May 2025 (huggingface/text-generation-inference#3204), vLLM's Rust server
    before September 2026 (vllm-project/vllm#56378), and others that serve our folders.
    """
    return template.replace(
        "'<|assistant|>\\n' + message['content'].strip() + eos_token }}",
        "'<|assistant|>\\n' }}{% generation %}{{ message['content'].strip() + eos_token }}"
        "{% endgeneration %}",
    )


def added_tokens(tokenizer: Tokenizer) -> list[dict]:
    """`added_tokens` of tokenizer.json: what is found in a text before anything is merged.

    Unknown, BOS and EOS are special; user-defined pieces are not.
    """
    sp, types = tokenizer.sp, piece_types(tokenizer)
    special = {sp.unk_id(), tokenizer.bos_id, tokenizer.eos_id}
    return [
        {"id": i, "content": sp.id_to_piece(i), "special": i in special, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, kind in enumerate(types)
        if i in special or kind == bpe.USER_DEFINED
    ]


def piece_types(tokenizer: Tokenizer) -> list[int]:
    """The type of each piece (see bpe.py)."""
    try:
        return bpe.piece_types(tokenizer.model)
    except ValueError as error:
        raise InputError(f"{tokenizer.path}: not a SentencePiece model ({error})") from None


def ranked_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of tokenizer.json; raises `InputError` where no list of merges gives our ids."""
    sp, types = tokenizer.sp, piece_types(tokenizer)
    for i, kind in enumerate(types):
        piece = sp.id_to_piece(i)
        if kind == bpe.UNUSED:
            raise InputError(f"{tokenizer.path}: piece {piece!r} is unused, expected none")
        if kind == bpe.USER_DEFINED and (tokenizer.legacy or set(piece) & {" ", "▁"}):
            where = "with legacy" if tokenizer.legacy else "with a space"
            raise InputError(
                f"{tokenizer.path}: piece {piece!r} is user-defined, which transformers splits in "
                f"another way {where}, expected none"
            )
    scores = {sp.id_to_piece(i): sp.get_score(i) for i, t in enumerate(types) if t == bpe.NORMAL}
    # SentencePiece merges any characters; the tokenizers package, only those that are pieces.
    if absent := set("".join(scores)) - scores.keys():
        raise InputError(
            f"{tokenizer.path}: character {min(absent)!r} stands in a piece and is none, expected "
            "a piece for each character"
        )
    try:
        return bpe.merges_in_order(scores)
    except ValueError as error:
        raise InputError(
            f"{tokenizer.path}: {error} compete: which is merged first depends on the text, and "
            "transformers would split it in another way; expected different scores"
        ) from None


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json: the SentencePiece model's pieces, and its steps.

    It is always made anew: a base's own file, though good for transformers, gives other ids in the
    tokenizers package alone, or makes tokens of texts.
    """
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
        "added_tokens": added_tokens(tokenizer),
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
            "merges": ranked_merges(tokenizer),
        },
    }


if __name__ == "__main__":
    with reported():
        folders = sys.argv[1:]
        if len(folders) != 1 or "chat_template" not in tokenizer_config(folders[0]):
            raise InputError(f"{' '.join(folders)}: expected the output folder of one run")
        print(marked(tokenizer_config(folders[0])["chat_template"]), end="")
