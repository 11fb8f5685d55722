"""What the files of a model folder say of its tokenizer, beside the vocabulary itself."""

from pathlib import Path

from program.errors import InputError
from program.files import read_object


def tokenizer_file(folder: str | Path) -> Path:
    """The file that holds a folder's vocabulary: tokenizer.model, else tokenizer.json."""
    paths = [Path(folder) / name for name in ("tokenizer.model", "tokenizer.json")]
    for path in paths:
        if path.is_file():
            return path
    raise InputError(
        f"{paths[0]}: no such file, expected Llama's SentencePiece model, or a {paths[1].name}"
    )


def tokenizer_config(folder: str | Path) -> dict:
    """`tokenizer_config.json` as a dict; empty where there is none."""
    return object_or_empty(Path(folder) / "tokenizer_config.json")


def object_or_empty(path: Path) -> dict:
    """The JSON object in a file; empty where there is no file."""
    return read_object(path) if path.is_file() else {}


def pad_token_id(folder: str | Path) -> int | None:
    """`pad_token_id` of config.json, or None."""
    path = Path(folder) / "config.json"
    value = object_or_empty(path).get("pad_token_id")
    if value is not None and type(value) is not int:
        raise InputError(f"{path}: pad_token_id is {value!r}, expected an integer or null")
    return value


def token_text(value: object) -> str | None:
    """The text of a token, given as a string or as an object with `content`; else None."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def named_tokens(folder: str | Path) -> list[str]:
    """The texts that the folder's files make one token of, whatever the vocabulary splits.

    They stand in tokenizer.json and tokenizer_config.json, or, as transformers 4 wrote them, in
    special_tokens_map.json and added_tokens.json.
    """
    folder = Path(folder)
    values = items(object_or_empty(folder / "tokenizer.json").get("added_tokens"))
    values += list(object_or_empty(folder / "added_tokens.json"))
    for config in (tokenizer_config(folder), object_or_empty(folder / "special_tokens_map.json")):
        for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
            values += items(config.get(name))
        values += [value for name, value in config.items() if name.endswith("_token")]
    return list(dict.fromkeys(text for value in values if (text := token_text(value))))


def items(value: object) -> list:
    """The values of a list or an object; none of anything else."""
    value = value.values() if isinstance(value, dict) else value
    return [] if value is None or isinstance(value, str | int | float) else list(value)
