"""Our token ids against transformers', which loads what `save_tokenizer` wrote, and our loss mask
against tokens written out by hand."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from conftest import train_tokenizer
from program.errors import InputError
from tokens.for_transformers import save_tokenizer
from tokens.tokenizer import Tokenizer

WHITE = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
WHITE += "\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"  # the last two are not white to `str.strip`
SNIPPETS = [
    "<|user|>", "<|assistant|>\n", "\n<|system|>\n", "▁", "▁▁", "<0x0A>", "\\n", "</s", "s>",
    "\x00", "\x7f", "\x1b[0m", "\ufffd", "👩\u200d👩\u200d👧", "🇫🇷", "e\u0301", "é", "ﬁ", "Ａ",
    "مرحبا", "你好", "\U0010ffff", "def f(x):\n    return x  # two", "3.14159", "\r\n", "a" * 40,
    "=-" * 30, "----", "........", "####",
]  # fmt: skip
FRAGMENTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(WHITE, max_size=4),
    st.sampled_from(SNIPPETS),
    st.integers(1, 100).map(lambda n: " " * n),
    st.tuples(st.sampled_from("-=#.*_x/▁"), st.integers(1, 100)).map(lambda t: t[0] * t[1]),
)
CONTENTS = st.lists(FRAGMENTS, max_size=6).map("".join)
# Without the three texts that are special tokens for transformers and text for us.
PLAIN = CONTENTS.filter(lambda text: not any(s in text for s in ("<s>", "</s>", "<unk>")))


def chats(contents):
    roles = st.sampled_from(["system", "user", "assistant"])
    message = st.fixed_dictionaries({"role": roles, "content": contents})
    return st.lists(message, min_size=1, max_size=6)


# The fixtures are the same for all examples, and times vary with the load of the machine.
PROPERTY = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def turns(*contents, first="user"):
    """Messages that alternate between user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[k % 2], "content": c} for k, c in enumerate(contents)]


def pair(model, folder, **config):
    """Our tokenizer of a base folder with this config, and transformers' tokenizer of our copy."""
    (folder / "base").mkdir()
    (folder / "saved").mkdir()
    shutil.copyfile(model, folder / "base" / "tokenizer.model")
    if config:
        (folder / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(folder / "base")
    save_tokenizer(ours, folder / "base", folder / "saved")
    return ours, AutoTokenizer.from_pretrained(folder / "saved")


@pytest.fixture(scope="module", params=[{}, {"legacy": False}, {"legacy": True}], ids=str)
def tiny(request, tokenizer_folder, tmp_path_factory):
    """Both tokenizers of the tiny model, for every setting of `legacy`."""
    model = tokenizer_folder / "tokenizer.model"
    return pair(model, tmp_path_factory.mktemp("tiny"), **request.param)


@pytest.fixture(scope="module", params=[{}, {"legacy": True}], ids=str)
def real(request, real_data, tmp_path_factory):
    """The same for Llama 2's own model."""
    model = real_data / "llama2-tokenizer" / "tokenizer.model"
    return pair(model, tmp_path_factory.mktemp("real"), **request.param)


def render(theirs, messages, prompt=False):
    return theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


def assert_same_ids(both, messages):
    ours, theirs = both
    assert ours.encode(messages)[0] == render(theirs, messages)
    assert ours.prompt(messages) == render(theirs, messages, prompt=True)


# ---- Token ids


@settings(max_examples=80, **PROPERTY)
@given(chats(PLAIN))
@example(turns("", "", "", ""))
@example(turns(*(" " * n + "x" + " " * n + "y" for n in (1, 2, 3, 15, 16, 17, 31, 100))))
def test_ids_equal_transformers_with_a_tiny_tokenizer(tiny, messages):
    """Any messages give equal ids, with and without generation prompt, under every `legacy`."""
    assert_same_ids(tiny, messages)


@settings(max_examples=80, **PROPERTY)
@given(chats(PLAIN))
@example(turns(*("a" + " " * n + "b\n" + " " * n + "c" for n in range(1, 100))))
@example(turns("word " * 3000, "def f():\n\treturn 0\n" * 800))
def test_ids_equal_transformers_with_llama_2s_tokenizer(real, messages):
    """The same holds with 32,000 pieces, whose runs of spaces are pieces that tie."""
    assert_same_ids(real, messages)


def test_ids_equal_transformers_on_real_conversations(real, real_data):
    """Indented code, LaTeX and the like give equal ids: every eighth conversation of the file."""
    lines = (real_data / "sft" / "code_alpaca_gsm8k.jsonl").read_text().splitlines()[::8]
    for line in lines:
        assert_same_ids(real, json.loads(line)["messages"])


@settings(max_examples=60, **PROPERTY)
@given(st.lists(st.sampled_from(["</s>", "<s>", "<unk>", "a", " ", "\n", "</", "s>"]), max_size=9))
def test_special_tokens_in_a_text_stay_text(tiny, fragments):
    """BOS and EOS come from the format alone, and decoding gives the text back."""
    tokenizer, content = tiny[0], "".join(fragments)
    ids, trained = tokenizer.encode(turns(content, content))
    assert (ids[0], ids[-1], sum(i <= 2 for i in ids)) == (1, 2, 2)
    expected = f"<|user|>\n{content.strip()}\n<|assistant|>\n{content.strip()}"
    assert tokenizer.decode(ids[1:-1]) == expected
    answer = [i for i, t in zip(ids, trained, strict=True) if t]
    # A piece before the answer, because decode drops a space at the beginning of a text.
    assert tokenizer.decode([tokenizer.line_feed, *answer]) == "\n" + content.strip()


@settings(max_examples=60, **PROPERTY)
@given(CONTENTS.filter(lambda text: "▁" not in text))
def test_decode_gives_the_content_back(tiny, content):
    """Nothing is normalised away (except "▁" itself, SentencePiece's sign for a space)."""
    tokenizer = tiny[0]
    expected = f"<|user|>\n{content.strip()}\n<|assistant|>\n"
    assert tokenizer.decode(tokenizer.prompt(turns(content))) == expected


def by_id(tokenizer):
    """Vocabulary and merges as transformers 5 makes them: merges in the order of their ids."""
    sp = tokenizer.sp
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    pieces = [p for p in vocab if not (sp.is_byte(vocab[p]) or sp.is_control(vocab[p]))]
    cuts = [(p[:k], p[k:]) for p in pieces for k in range(1, len(p))]
    merges = [(a, b) for a, b in cuts if a in vocab and b in vocab]
    return vocab, sorted(merges, key=lambda m: (vocab[m[0] + m[1]], len(m[0]), len(m[1])))


def test_a_tokenizer_json_is_made_anew(real_data, tmp_path):
    """transformers' own file for Llama 2 merges spaces in another order, and is not taken over."""
    model = real_data / "llama2-tokenizer" / "tokenizer.model"
    shutil.copyfile(model, tmp_path / "tokenizer.model")
    ours = Tokenizer(tmp_path)
    vocab, merges = by_id(ours)
    LlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "saved").mkdir()
    save_tokenizer(ours, tmp_path, tmp_path / "saved")
    right = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "if x:\n     y  = 2"
    assert_same_ids((ours, right), turns("x  = 1", text))
    ids = ours.sp.encode(text)
    assert wrong.encode(text, add_special_tokens=False) != ids
    assert right.encode(text, add_special_tokens=False) == ids


def test_plain_text_gets_one_bos(tiny):
    """Without the chat format, the saved tokenizer puts one BOS before a text, as Llama's does."""
    ours, theirs = tiny
    assert theirs("The dog").input_ids == [1, *ours.sp.encode("The dog")]
    assert theirs.decode(theirs("The dog").input_ids, skip_special_tokens=True) == "The dog"


def test_saving_what_was_saved_changes_nothing(tiny, tmp_path):
    """From the folder that SFT wrote, DPO writes the same three files."""
    ours, theirs = tiny
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    save_tokenizer(ours, ours.path.parent, first)
    save_tokenizer(Tokenizer(first), first, second)
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in first.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def piece_field(text, score_bytes=b"\0\0\0\0"):
    """One more piece for the end of a tokenizer.model: field 1 of its protobuf message."""
    encoded = text.encode()
    message = b"\x0a" + bytes([len(encoded)]) + encoded + b"\x15" + score_bytes
    return b"\x0a" + bytes([len(message)]) + message


def test_a_vocabulary_like_code_llamas(real_data, tmp_path):
    """32,016 pieces, and a config for another class with tokens for infilling, work alike."""
    model = (real_data / "llama2-tokenizer" / "tokenizer.model").read_bytes()
    infill = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT"]
    infill += [f"▁<{name}>" for name in ("PRE", "SUF", "MID", "EOT")] + list("ᚠᚢᚦᚨᚱ")
    (tmp_path / "code.model").write_bytes(model + b"".join(map(piece_field, infill)))
    both = pair(
        tmp_path / "code.model",
        tmp_path,
        tokenizer_class="CodeLlamaTokenizer",
        prefix_token="▁<PRE>",
        middle_token="▁<MID>",
        suffix_token="▁<SUF>",
        eot_token="▁<EOT>",
        bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True},
    )
    assert both[0].vocab_size == len(both[1]) == 32_016
    assert_same_ids(both, turns("fill <FILL_ME> in: a <PRE> b", "x =  1 <EOT> ᚠ", "  ", "ok"))
    both[0].check_fits(32_016)
    with pytest.raises(InputError, match="32016 pieces, expected at most the 32000 rows"):
        both[0].check_fits(32_000)


# ---- What is trained


def spell(tokenizer, messages):
    """Pieces of a conversation as one string, with brackets around trained ones."""
    ids, trained = tokenizer.encode(messages)
    assert len(ids) == len(trained) and all(isinstance(i, int) for i in ids)
    spans, before = "", False
    for i, now in zip(ids, trained, strict=True):
        spans += ("[" if now else "]") * (now != before) + tokenizer.visible([i])
        before = now
    return spans + "]" * before


SYSTEM = {"role": "system", "content": "Be brief."}
# What stands after EOS under `legacy` is "▁", shown as a space.
HAND_MADE = {
    "one turn": (turns("Hi", "Yes"), "<s> <|user|>\nHi\n<|assistant|>\n[Yes</s>]"),
    "several turns": (
        turns("a", "b", "c", "d"),
        "<s> <|user|>\na\n<|assistant|>\n[b</s>]{}\n<|user|>\nc\n<|assistant|>\n[d</s>]",
    ),
    "ends in a question": (
        turns("a", "b", "c"),
        "<s> <|user|>\na\n<|assistant|>\n[b</s>]{}\n<|user|>\nc\n",
    ),
    "empty answer": (turns("a", " \n"), "<s> <|user|>\na\n<|assistant|>\n[</s>]"),
    "empty question": (turns("", "b"), "<s> <|user|>\n\n<|assistant|>\n[b</s>]"),
    "answer with lines": (
        turns("\na\n\nb\n", " c\n\n d\n"),
        "<s> <|user|>\na\n\nb\n<|assistant|>\n[c\n\n d</s>]",
    ),
    "consecutive answers": (
        [turns("a", "b")[1], turns("a", "c")[1]],
        "<s> <|assistant|>\n[b</s>]{}\n<|assistant|>\n[c</s>]",
    ),
    "answer first": (
        turns("a", "b", "c", first="assistant"),
        "<s> <|assistant|>\n[a</s>]{}\n<|user|>\nb\n<|assistant|>\n[c</s>]",
    ),
    "system": (
        [SYSTEM, *turns("a", "b")],
        "<s> <|system|>\nBe brief.\n<|user|>\na\n<|assistant|>\n[b</s>]",
    ),
    "no answer": ([SYSTEM, *turns("a")], "<s> <|system|>\nBe brief.\n<|user|>\na\n"),
    "tags in the text": (
        turns("<|assistant|>\na", "<|user|>\nb</s>\n"),
        "<s> <|user|>\n<|assistant|>\na\n<|assistant|>\n[<|user|>\nb</s></s>]",
    ),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_content_and_eos_of_every_answer_are_trained(tiny, name):
    """Content and EOS are trained, and no tag, no line feed around them and no other role is."""
    messages, expected = HAND_MADE[name]
    assert spell(tiny[0], messages) == expected.format(" " if tiny[0].legacy else "")


def test_one_conversation_token_by_token(tokenizer_folder):
    """Pieces and mask of one conversation are as written out here."""
    tokenizer = Tokenizer(tokenizer_folder)
    ids, trained = tokenizer.encode(turns("The dog", "is  4", "z"))
    pieces = [tokenizer.sp.id_to_piece(i) for i in ids]
    assert " ".join(pieces) == (
        "<s> ▁<| user |> <0x0A> T he ▁dog <0x0A> <| a ssistant |> <0x0A> "
        "is ▁▁ 4 </s> <0x0A> <| user |> <0x0A> z <0x0A>"
    )
    assert trained == [False] * 14 + [True] * 4 + [False] * 7


def test_the_docstring_shows_what_llama_2s_tokenizer_makes(real):
    """Pieces, ids and mask of the example in `Tokenizer.encode` are what it returns."""
    tokenizer = real[0]
    ids, trained = tokenizer.encode(turns("Hi", "Hello!"))
    rows = [line.split() for line in Tokenizer.encode.__doc__.split("):\n")[1].splitlines()]
    rows = [row for row in rows if row]  # pieces, ids, marks, and the same of the second half
    pieces, numbers, marks = (rows[k] + rows[k + 3] for k in range(3))
    assert [piece.replace("⏎", "<0x0A>") for piece in pieces] == [
        tokenizer.sp.id_to_piece(i) for i in ids
    ]
    assert list(map(int, numbers)) == ids
    assert [mark == "^" for mark in marks] == trained


@settings(max_examples=40, **PROPERTY)
@given(chats(PLAIN))
def test_mask_equals_re_tokenised_prefixes(tiny, messages):
    """transformers' ids of the chat up to each answer, and to its end, are prefixes of the whole;
    what lies between them is trained."""
    ours, theirs = tiny
    whole = render(theirs, messages)
    expected = [False] * len(whole)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            if k:
                begin = render(theirs, messages[:k], prompt=True)
            else:  # transformers renders no empty conversation
                opening = "<s>" + " " * (not ours.legacy) + "<|assistant|>\n"
                begin = theirs.encode(opening, add_special_tokens=False)
            end = render(theirs, messages[: k + 1])
            assert whole[: len(begin)] == begin and whole[: len(end)] == end
            expected[len(begin) : len(end)] = [True] * (len(end) - len(begin))
    assert ours.encode(messages)[1] == expected


# ---- Refusals


@pytest.mark.parametrize(
    "problem, changes",
    [
        ("no BOS", {"bos_id": -1}),
        ("no EOS", {"eos_id": -1}),
        (
            "no byte fallback",
            {"byte_fallback": False, "vocab_size": 120, "character_coverage": 1.0},
        ),
        ("does not begin a text with '▁'", {"add_dummy_prefix": False}),
        ("does not begin a text with '▁'", {"treat_whitespace_as_suffix": True}),
        ("normalises", {"remove_extra_whitespaces": True}),
        ("normalises", {"normalization_rule_name": "nfkc"}),
        ("line feed", {"user_defined_symbols": ["\n\n"]}),
        ("line feed", {"user_defined_symbols": ["\n"]}),
        ("not BPE", {"model_type": "unigram", "vocab_size": 330}),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(problem, changes, tmp_path):
    """A model that lacks a property that encoding relies on is refused, and the property named."""
    train_tokenizer(tmp_path, **changes)
    with pytest.raises(InputError, match=problem):
        Tokenizer(tmp_path)


def test_unreadable_tokenizers_are_refused(tokenizer_folder, tmp_path):
    """A missing file, one of another kind, and a config that is no JSON object are refused."""
    with pytest.raises(InputError, match="no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not protobuf")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)
    shutil.copyfile(tokenizer_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    for text in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(InputError, match="tokenizer_config.json"):
            Tokenizer(tmp_path)
