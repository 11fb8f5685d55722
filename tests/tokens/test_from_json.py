"""A tokenizer.json without tokenizer.model, as transformers 5 and TRL save it: the same ids as with
it, or a refusal that says what to do."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from test_for_transformers import token, write_base
from test_tokenizer import PLAIN, PROPERTY, chats, turns
from transformers import AutoTokenizer

import sft
from conftest import train_tokenizer
from program.errors import InputError
from tokens import bpe
from tokens.for_transformers import check_tokenizer, save_tokenizer
from tokens.protobuf import field, fields
from tokens.tokenizer import Tokenizer


def saved_json(tokenizer_folder, folder, config=None):
    """The tokenizer.json that stands for a tokenizer.model, and the original's tokenizer."""
    model = (tokenizer_folder / "tokenizer.model").read_bytes()
    base = write_base(folder / "original", model, config)
    (folder / "saved").mkdir()
    original = Tokenizer(base)
    save_tokenizer(original, base, folder / "saved")
    return json.loads((folder / "saved" / "tokenizer.json").read_text()), original


def folder_with(path, content, config=None):
    """A folder with this tokenizer.json and no tokenizer.model."""
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text(json.dumps(content))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def content(tokenizer_folder, tmp_path_factory):
    """The tokenizer.json of the tiny tokenizer."""
    return saved_json(tokenizer_folder, tmp_path_factory.mktemp("content"))[0]


def like_llama_2(content):
    """The other way to write the same: by a normaliser, merges as text, a pad token beyond."""
    content = copy.deepcopy(content)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space]
    content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["added_tokens"].append(token(len(content["model"]["vocab"]), "<pad>"))
    return content


@pytest.fixture(scope="module", params=["ours", "like Llama 2's", "by transformers 5", "legacy"])
def tiny(request, tokenizer_folder, tmp_path_factory):
    """The tokenizer of a tokenizer.model, and of a folder that has only its tokenizer.json."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {"legacy": True} if request.param == "legacy" else None
    content, original = saved_json(tokenizer_folder, folder, config)
    if request.param == "by transformers 5":
        AutoTokenizer.from_pretrained(folder / "saved").save_pretrained(folder / "json")
        assert not (folder / "json" / "tokenizer.model").exists()
        return original, Tokenizer(folder / "json")
    content = like_llama_2(content) if request.param == "like Llama 2's" else content
    return original, Tokenizer(folder_with(folder / "json", content, config))


@settings(max_examples=80, **PROPERTY)
@given(chats(PLAIN))
@example(turns(*(" " * n + "=" * n + "x" + "-=" * n for n in (1, 2, 3, 15, 16, 17, 31, 100))))
def test_ids_equal_those_of_tokenizer_model(tiny, messages):
    """Ids and mask, whoever wrote the tokenizer.json and in which of the two ways."""
    original, ours = tiny
    assert ours.path.name == "tokenizer.json"
    assert ours.encode(messages) == original.encode(messages)
    assert ours.decode(ours.encode(messages)[0]) == original.decode(original.encode(messages)[0])


def test_what_is_saved_has_a_tokenizer_model(tiny, tmp_path):
    """It holds the same pieces and gives the same ids, to us and to transformers."""
    original, ours = tiny
    assert check_tokenizer(ours, ours.path.parent) in ([], ["<pad>"])
    save_tokenizer(ours, ours.path.parent, tmp_path)
    again = Tokenizer(tmp_path)
    assert again.path.name == "tokenizer.model" and again.vocab_size == original.vocab_size
    messages = turns("The dog  x", "==== ---- é 你", "def f(x):\n        return", "ok")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = original.encode(messages)[0]
    assert again.encode(messages)[0] == expected
    assert theirs.apply_chat_template(messages, return_dict=False) == expected


@pytest.mark.parametrize("order", ["by score", "by id"])
def test_llama_2s_tokenizer_json(real_data, tmp_path, order):
    """32,000 pieces with spaces of equal score; and as transformers 5 orders them by itself.

    By id, runs of spaces merge first: other ids than Llama 2's, but those that transformers gives
    from that folder.
    """
    content, original = saved_json(real_data / "llama2-tokenizer", tmp_path)
    vocab, config = content["model"]["vocab"], {"bos_token": "<s>", "eos_token": "</s>"}
    if order == "by id":
        content["model"]["merges"].sort(key=lambda m: (vocab[m[0] + m[1]], len(m[0]), len(m[1])))
    folder = folder_with(tmp_path / "json", content, config | {"tokenizer_class": "LlamaTokenizer"})
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    lines = (real_data / "sft" / "code_alpaca_gsm8k.jsonl").read_text().splitlines()[::100]
    spaces = turns(*("a" + " " * n + "b\n" + " " * n + "c" for n in range(1, 40)))
    for messages in [*(json.loads(line)["messages"] for line in lines), spaces]:
        ids = ours.encode(messages)[0]
        chat = {"chat_template": saved["chat_template"], "return_dict": False}
        assert ids == theirs.apply_chat_template(messages, **chat)
        assert order == "by id" or ids == original.encode(messages)[0]
    assert (ours.encode(spaces) == original.encode(spaces)) == (order == "by score")


def test_a_run_from_such_a_folder(base, conversations, content, tmp_path):
    """sft.py trains the same as from the folder with tokenizer.model, and writes one."""
    source = Path(shutil.copytree(base, tmp_path / "base"))
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(json.dumps(like_llama_2(content)))
    logs = []
    for model in (base, source):
        out = tmp_path / f"out-{model.name}-{len(logs)}"
        flags = {"model": str(model), "data": [str(conversations)], "out": str(out)}
        sft.main(flags | {"batch_size": 24, "max_steps": 1})
        logs.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["loss"])
    assert logs[0] == logs[1]
    assert Tokenizer(out).path.name == "tokenizer.model"


def change(content, **fields):
    """The content with other fields, those of `model` by model__name."""
    content = copy.deepcopy(content)
    for name, value in fields.items():
        part, _, inner = name.partition("__")
        if inner:
            content[part][inner] = value(content) if callable(value) else value
        else:
            content[part] = value
    return content


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "first"}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"model__type": "Unigram"}, "model.type is 'Unigram'"),
        ({"model__byte_fallback": False}, "model.byte_fallback is False"),
        ({"model__dropout": 0.1}, "model.dropout is 0.1"),
        ({"model__ignore_merges": True}, "model.ignore_merges is True"),
        ({"model__end_of_word_suffix": "</w>"}, "model.end_of_word_suffix is '</w>'"),
        ({"normalizer": {"type": "NFKC"}}, 'normalizer is {"type": "NFKC"}'),
        ({"pre_tokenizer": None}, "pre_tokenizer is null"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, 'pre_tokenizer is {"type": "ByteLevel"}'),
        ({"pre_tokenizer": METASPACE | {"split": True}}, "pre_tokenizer is"),
        ({"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}, "pre_tokenizer is"),
        ({"model__merges": lambda c: c["model"]["merges"][1:]}, "model.merges and model.vocab"),
        ({"model__merges": lambda c: c["model"]["merges"] * 2}, "model.merges holds something"),
        ({"model__merges": ["a b c"]}, "model.merges holds something else"),
        ({"model__merges": [5]}, "tokenizer.json: TypeError"),
        ({"model__merges": [["a", 5]]}, "model.merges holds something else"),
        ({"model__vocab": lambda c: c["model"]["vocab"] | {"zzz": 400}}, "the ids 0 to 360 once"),
        ({"model__vocab": lambda c: c["model"]["vocab"] | {"zzz": 5}}, "gives two pieces one id"),
        ({"model__vocab": {}}, "gives two pieces one id"),
        ({"model__vocab": []}, "tokenizer.json: "),
        ({"model__unk_token": "<none>"}, "'<none>' is not in list"),
        ({"model": None}, "tokenizer.json: AttributeError"),
        ({"added_tokens": 7}, "tokenizer.json: TypeError"),
    ],
)
def test_a_tokenizer_json_of_another_kind(content, tmp_path, fields, expected):
    """It is refused by what is wrong, with what to do."""
    folder = folder_with(tmp_path / "json", change(content, **fields))
    with pytest.raises(InputError) as caught:
        Tokenizer(folder)
    assert expected in str(caught.value)
    assert "copy tokenizer.model from the base model into this folder" in str(caught.value)


def test_merges_in_an_order_that_sentencepiece_has_not(tmp_path):
    """With "zz" and "zzz" of one rank, "zzzz" is "zzz" and "z"; a list may say "zz" and "zz"."""
    train_tokenizer(tmp_path / "model", vocab_size=340)
    path = tmp_path / "model" / "tokenizer.model"
    extra = [field(1, field(1, "z" * n) + field(2, -9000.0 - n)) for n in (2, 3)]
    path.write_bytes(path.read_bytes() + b"".join(extra))
    content, _ = saved_json(tmp_path / "model", tmp_path)
    merges = content["model"]["merges"]
    assert merges[-3:] == [["z", "z"], ["zz", "z"], ["z", "zz"]]
    Tokenizer(folder_with(tmp_path / "right", content))
    merges[-3:] = [["z", "zz"], ["z", "z"], ["zz", "z"]]
    with pytest.raises(InputError, match="split '.*z+' in another way than SentencePiece"):
        Tokenizer(folder_with(tmp_path / "wrong", content))


def test_protobuf_fields_survive():
    """What `field` writes, `fields` reads; a message that is cut is refused."""
    values = [(1, 0), (3, 127), (40, 128), (53, 1 << 40), (2, b""), (16, b"x" * 300)]
    message = b"".join(field(number, value) for number, value in values)
    assert list(fields(message)) == values
    assert list(fields(field(2, -1.5))) == [(2, b"\0\0\xc0\xbf")]
    for end in (len(message) - 1, 1):
        with pytest.raises(ValueError, match="no protobuf message"):
            list(fields(message[:end]))


def test_the_types_of_pieces(tiny):
    """The model made from a tokenizer.json has the types of the original."""
    original, ours = tiny
    assert bpe.piece_types(ours.model) == bpe.piece_types(original.model)
    assert ours.sp.unk_id() == original.sp.unk_id()


VALUES = [None, True, -1, 0, 5, 1e9, "", "▁", "<s>", "\ud800", [], {}, [[]], ["a", "b"], {"id": 1}]


def mutated(value, rng):
    """A JSON value with one part, at any depth, replaced, removed or doubled."""
    if rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    value = copy.copy(value)
    if rng.random() < 0.15:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, list):
        value.insert(0, value[key])
    else:
        value[key] = mutated(value[key], rng)
    return value


def test_no_tokenizer_json_ends_in_a_traceback(content, tmp_path):
    """Of 120 mutants (seeded) each is read or refused by an `InputError`."""
    rng, read = random.Random(0), 0
    folder = folder_with(tmp_path / "json", content, {"bos_token": "<s>"})
    for _ in range(120):
        (folder / "tokenizer.json").write_text(json.dumps(mutated(content, rng)))
        try:
            check_tokenizer(Tokenizer(folder), folder)
            read += 1
        except InputError:
            pass
    assert 0 < read < 120
