"""What is saved beside a model gives our ids to transformers and to the tokenizers package alone,
whatever tokens the base's files add, or the run does not start."""

import json
import shutil
from pathlib import Path

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import PROPERTY, SNIPPETS, turns
from transformers import AutoTokenizer

import sft
from conftest import run_program, train_tokenizer
from program.errors import InputError
from tokens import bpe
from tokens.for_transformers import check_tokenizer, marked, save_tokenizer
from tokens.protobuf import field
from tokens.tokenizer import Tokenizer

ADDED = ["<|user|>", "<|im_end|>", "<pad>", "[PAD]", "dog", "##", "~~"]
TEXTS = st.lists(st.sampled_from([*ADDED, *ADDED, *SNIPPETS, " ", "   ", "the "]), max_size=9)


def token(i, text, **flags):
    """One of `added_tokens` in a tokenizer.json, or of `added_tokens_decoder` without its id."""
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"id": i, "content": text, "special": True} | plain | flags


def piece(text, score=0.0, kind=bpe.NORMAL):
    """One more piece for the end of a tokenizer.model."""
    return field(1, field(1, text) + field(2, float(score)) + field(3, kind))


def write_base(folder, model, config=None, **files):
    """A folder with this tokenizer.model, tokenizer_config.json, and other JSON files by name."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in {"tokenizer_config": config, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def save(base, folder):
    """Our tokenizer of a base, and how each reader of what we save encodes a chat."""
    ours = Tokenizer(base)
    check_tokenizer(ours, base)
    folder.mkdir()
    save_tokenizer(ours, base, folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def by_tokenizers(messages, **flags):
        text = theirs.apply_chat_template(messages, tokenize=False, **flags)
        return alone.encode(text, add_special_tokens=False).ids

    def by_transformers(messages, **flags):
        return theirs.apply_chat_template(messages, return_dict=False, **flags)

    return ours, (by_transformers, by_tokenizers), theirs


@pytest.fixture(scope="module")
def model(tokenizer_folder):
    """The bytes of the tiny tokenizer.model."""
    return (tokenizer_folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def own_json(tokenizer_folder, tmp_path_factory):
    """The tokenizer.json that we write for it."""
    folder = tmp_path_factory.mktemp("own")
    save_tokenizer(Tokenizer(tokenizer_folder), tokenizer_folder, folder)
    return json.loads((folder / "tokenizer.json").read_text())


STRIPPED = [token(i, t, lstrip=True, rstrip=True) for i, t in enumerate(("<unk>", "<s>", "</s>"))]
CONFIG = {
    "added_tokens_decoder": {str(i): t for i, t in enumerate(STRIPPED)},
    "bos_token": {"__type": "AddedToken", "content": "<s>", "rstrip": True},
    "pad_token": "[PAD]",
    "additional_special_tokens": ["<|user|>"],
    "extra_special_tokens": {"end": "<|im_end|>"},
    "add_prefix_space": True,
    "split_special_tokens": True,
    "eot_token": "##",
}
USER_DEFINED = b"".join(piece(text, 0, bpe.USER_DEFINED) for text in ("<|user|>", "~~", "<|us"))
CONTROL = piece("<pad>", 0, bpe.CONTROL) + piece("<|im_end|>", 0, bpe.CONTROL)


@pytest.fixture(
    scope="module",
    params=["added", "stripped", "old files", "legacy", "user-defined", "control", "equal scores"],
)
def served(request, model, own_json, tmp_path_factory):
    """A base whose files add tokens or pieces; see `save`."""
    added = own_json["added_tokens"] + [token(360 + i, text) for i, text in enumerate(ADDED)]
    old = {"pad_token": "[PAD]", "additional_special_tokens": [token(361, "<|im_end|>")]}
    folder = tmp_path_factory.mktemp("served")
    write = {
        "added": (model, None, {"tokenizer": own_json | {"added_tokens": added}}),
        "stripped": (model, CONFIG, {"tokenizer": own_json | {"added_tokens": STRIPPED}}),
        "old files": (model, None, {"special_tokens_map": old, "added_tokens": {"dog": 400}}),
        "legacy": (model, CONFIG | {"legacy": True}, {}),
        "user-defined": (model + USER_DEFINED, None, {}),
        "control": (model + CONTROL, {"pad_token": "<pad>"}, {}),
        "equal scores": (model + piece("dog") + piece("####"), None, {}),
    }
    content, config, files = write[request.param]
    return save(write_base(folder / "base", content, config, **files), folder / "saved")


@settings(max_examples=60, **PROPERTY)
@given(st.lists(TEXTS.map("".join), min_size=1, max_size=4))
def test_readers_agree_on_texts_that_are_tokens_of_the_base(served, contents):
    """Tokens of the base, strip flags and user-defined pieces change no id in any reader."""
    ours, readers, _ = served
    for read in readers:
        assert read(turns(*contents)) == ours.encode(turns(*contents))[0]
        assert read(turns(*contents), add_generation_prompt=True) == ours.prompt(turns(*contents))


def test_no_reader_knows_an_id_that_we_do_not(served):
    """As many tokens as pieces: a larger id would have no row in the embedding."""
    ours, _, theirs = served
    assert len(theirs) == ours.vocab_size
    assert theirs.pad_token_id == 0  # <unk>


def test_padded_batches(served):
    """transformers pads with <unk>, which is no EOS, and masks it; the ids are what they were."""
    ours, _, theirs = served
    chats = [turns("a", "b"), turns("a longer one", "with an answer", "and more")]
    texts = [theirs.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = theirs(texts, padding=True, add_special_tokens=False)
    for chat, ids, mask in zip(chats, batch["input_ids"], batch["attention_mask"], strict=True):
        assert [i for i, m in zip(ids, mask, strict=True) if m] == ours.encode(chat)[0]
        assert {i for i, m in zip(ids, mask, strict=True) if not m} <= {ours.sp.unk_id()}
    assert not all(map(all, batch["attention_mask"]))


def test_marks_for_trl(served):
    """The marked template renders the same text, and transformers' mask is what we train."""
    ours, _, theirs = served
    template = marked(theirs.chat_template)
    for contents in (["q", "a"], ["q", " an answer\n", "dog", "x  y", "z"]):
        chat = turns(*contents)
        for prompt in (False, True):
            flags = {"tokenize": False, "add_generation_prompt": prompt}
            plain = theirs.apply_chat_template(chat, **flags)
            assert theirs.apply_chat_template(chat, chat_template=template, **flags) == plain
        flags = {"return_dict": True, "return_assistant_tokens_mask": True}
        masked = theirs.apply_chat_template(chat, chat_template=template, **flags)
        ids, trained = ours.encode(chat)
        assert masked["input_ids"] == ids
        assert masked["assistant_masks"] == [int(t) for t in trained]


def test_plain_jinja2_takes_the_chat_template(served):
    """It, and whoever else does not know transformers' tag, gets the same text."""
    _, _, theirs = served
    chat = turns("q", "a", "q")
    environment = jinja2.Environment()
    tokens = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
    text = environment.from_string(theirs.chat_template).render(messages=chat, **tokens)
    assert text == theirs.apply_chat_template(chat, tokenize=False)
    template = marked(theirs.chat_template)
    with pytest.raises(jinja2.TemplateSyntaxError, match="unknown tag 'generation'"):
        environment.from_string(template)


def test_the_marked_template_is_printed(served):
    """For a folder that training has saved; another one is refused."""
    _, _, theirs = served
    assert run_program("-m", "tokens.for_transformers", theirs.name_or_path) == marked(
        theirs.chat_template
    )


def test_user_defined_pieces_are_one_token(model, tmp_path):
    """For us and, as added tokens, for both readers; the longest of several counts."""
    ours, readers, _ = save(write_base(tmp_path / "base", model + USER_DEFINED), tmp_path / "saved")
    expected = [ours.sp.piece_to_id(text) for text in ("<|user|>", "~~", "<|us")]
    assert expected == [360, 361, 362]
    messages = turns("x<|user|>~~<|us")
    for ids in (ours.encode(messages)[0], *(read(messages) for read in readers)):
        assert [i for i in ids if i >= 360][1:] == expected  # after the tag


def test_what_a_config_may_keep(model, tmp_path):
    """Length, sides and a pad token that is one of ours; nothing that makes transformers 4 ask for
    protobuf (`add_prefix_space`)."""
    kept = {"model_max_length": 4096, "padding_side": "left", "pad_token": "</s>"}
    base = write_base(tmp_path / "base", model, CONFIG | kept)
    _, _, theirs = save(base, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    names = {"bos_token", "eos_token", "unk_token", "tokenizer_class", "legacy", "add_bos_token"}
    assert saved.keys() == kept.keys() | names | {"add_eos_token", "chat_template"}
    assert kept.items() <= saved.items() and theirs.pad_token_id == 2


def test_the_base_s_tokens_are_named(model, own_json, tmp_path):
    """A run says which texts are tokens of the base and plain text here."""
    added = own_json["added_tokens"] + [token(360, "<|im_end|>")]
    files = {"tokenizer": own_json | {"added_tokens": added}, "added_tokens": {"dog": 361}}
    base = write_base(tmp_path / "base", model, CONFIG, **files)
    texts = check_tokenizer(Tokenizer(base), base)
    assert sorted(texts) == sorted(["<|im_end|>", "dog", "<|user|>", "[PAD]", "##"])


@pytest.mark.parametrize(
    "pieces, config, expected",
    [
        (piece("gz") + piece("zq"), {}, "pieces 'gz' and 'zq' of equal score compete"),
        (piece("gz") + piece("zg"), {}, "of equal score compete"),
        (piece("zz", 0, bpe.USER_DEFINED), {"legacy": True}, "'zz' is user-defined, which tran"),
        (piece("▁zz", 0, bpe.USER_DEFINED), {}, "'▁zz' is user-defined, which transformers split"),
        (piece("zß§"), {}, "character '§' stands in a piece and is none"),
        (piece("zz", 0, bpe.UNUSED), {}, "piece 'zz' is unused, expected none"),
    ],
)
def test_pieces_that_no_tokenizer_json_stands_for(model, tmp_path, pieces, config, expected):
    """The run is refused before it starts, by the name of the piece."""
    base = write_base(tmp_path / "base", model + pieces, config)
    base_tokenizer = Tokenizer(base)
    with pytest.raises(InputError, match="tokenizer.model: ") as caught:
        check_tokenizer(base_tokenizer, base)
    assert expected in str(caught.value)


def test_merges_of_equal_score_that_compete():
    """SentencePiece takes the leftmost of "ab" and "bc" in "abc"; so does a list, one way round.

    In "abab" and "baba" no list of merges can: "ab" or "ba" wins by where it stands.
    """
    assert bpe.merged("abcabc", {("a", "b"): 0, ("b", "c"): 0}) == ["ab", "c", "ab", "c"]
    assert bpe.merged("bcabab", {("a", "b"): 0, ("b", "c"): 1}) == ["bc", "ab", "ab"]
    scores = dict.fromkeys("abcd", 0.0)
    assert bpe.merges_in_order(scores | {"ab": 0.0, "cd": 0.0}) == [("a", "b"), ("c", "d")]
    for rivals in ({"ab": 0.0, "bc": 0.0}, {"ab": 0.0, "ba": 0.0}, {"ab": 0, "cd": 0, "abc": 1}):
        with pytest.raises(ValueError, match="of equal score"):
            bpe.merges_in_order(scores | rivals)


@pytest.mark.parametrize("change", [{"zzq": 360}, {"the": 5}])
def test_a_larger_or_other_vocabulary_in_tokenizer_json(model, own_json, tmp_path, change):
    """Which of two contradicting files is the model's, nobody knows: refused by the piece."""
    changed = json.loads(json.dumps(own_json))
    changed["model"]["vocab"] |= change
    base = write_base(tmp_path / "base", model, None, tokenizer=changed)
    with pytest.raises(InputError, match=f"tokenizer.json: .*{list(change)[0]!r}"):
        check_tokenizer(Tokenizer(base), base)


def test_a_run_says_what_changes(base, conversations, own_json, tmp_path, capsys):
    """One line for a context that grows, one for tokens that become text; then the saved model's
    context holds the longest conversation."""
    source = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    out = tmp_path / "out"
    sft.main(
        {"model": str(source), "data": [str(conversations)], "out": str(out)}
        | {"batch_size": 24, "max_steps": 1}
    )
    tokenizer = Tokenizer(base)
    records = map(json.loads, Path(conversations).read_text().splitlines())
    longest = max(len(tokenizer.encode(record["messages"])[0]) for record in records)
    printed = capsys.readouterr().out
    assert f"the longest sequence has {longest:,} tokens, the base's max_position_" in printed
    assert "tokens of the base, plain text here and in the saved tokenizer: [PAD]\n" in printed
    saved = json.loads((out / "config.json").read_text())
    assert saved["max_position_embeddings"] == longest


def test_spaces_of_equal_score(tmp_path):
    """User-defined runs of spaces, as some code models have them, are refused by name."""
    train_tokenizer(tmp_path, user_defined_symbols=["▁▁▁"])
    with pytest.raises(InputError, match="'▁▁▁' is user-defined"):
        check_tokenizer(Tokenizer(tmp_path), tmp_path)
