"""The Tulu chat format: messages in, token ids and loss mask out.

A conversation as text, and the part of it that is trained (^), byte by byte as Tulu 2 had it
(open-instruct finetune.py; EasyLM data.py):

    <s> <|user|>⏎ What is 2+2? ⏎ <|assistant|>⏎ 4 </s> ⏎ <|user|>⏎ …
                                                ^ ^^^^

`<s>` and `</s>` are put in as ids; role tags are plain text. Training, data.py and generation go
through `Tokenizer`; `save_tokenizer` writes the files that make transformers and vLLM do the same.
"""

import json
from pathlib import Path

import sentencepiece

from program.errors import InputError

ROLES = ("system", "user", "assistant")


class Tokenizer:
    """Llama's SentencePiece model with the Tulu chat format around it.

    `folder` holds `tokenizer.model` and, if there is one, `tokenizer_config.json`, whose `legacy`
    decides whether "▁" follows EOS. Raises `InputError` for any other kind of tokenizer.
    """

    def __init__(self, folder):
        self.path = Path(folder) / "tokenizer.model"
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file, expected Llama's SentencePiece model")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{self.path}: not a SentencePiece model ({error})") from None
        self.legacy = bool(tokenizer_config(folder).get("legacy"))
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = self.sp.vocab_size()
        self.line_feed = self.sp.piece_to_id("<0x0A>")
        self.check_like_llama()

    def check_like_llama(self):
        """Raise where the model lacks a property that `encode` relies on."""
        space, sample = self.sp.piece_to_id("▁"), "  ａ ﬁ\t\r  é "
        scores = piece_scores(self.sp)
        for problem, found in (
            ("has no BOS or no EOS", min(self.bos_id, self.eos_id) < 0),
            ("has no byte fallback", not self.sp.is_byte(self.line_feed)),
            ("has pieces with a line feed in them", any("\n" in piece for piece in scores)),
            # BPE scores a piece by the number of its merge, a unigram model by a log-probability.
            ("is not BPE", any(score % 1 for score in scores.values())),
            ("does not begin a text with '▁'", self.sp.encode("\n") != [space, self.line_feed]),
            ("normalises its input", self.sp.decode(self.sp.encode(sample)) != sample),
        ):
            if found:
                raise InputError(
                    f"{self.path}: {problem}, expected a model like Llama's "
                    "(BPE, byte fallback, identity normalisation, dummy prefix)"
                )

    def check_fits(self, rows):
        """Raise `InputError` where a token id would have no row in a model's embedding."""
        if self.vocab_size > rows:
            raise InputError(
                f"{self.path}: {self.vocab_size} pieces, expected at most the {rows} rows of the "
                "model's embedding (vocab_size)"
            )

    def encode(self, messages):
        """A conversation's `(ids, trained)`: list of int, and list of bool of the same length.

        Trained are the content and the EOS of every assistant message.
        """
        return self._encode(messages, answer=False)

    def prompt(self, messages, prefill=""):
        """Token ids up to where the next answer begins: they end in `<|assistant|>⏎`.

        prefill: the beginning of the answer, put into the assistant's mouth.
        """
        return self._encode(messages, answer=True, prefill=prefill)[0]

    def raw(self, text):
        """Token ids of BOS and a text that is to be continued as it stands, without chat format."""
        return [self.bos_id, *self.sp.encode(text)]

    def decode(self, ids):
        """Text of generated ids; BOS, EOS and ids without a piece leave no trace."""
        return self.sp.decode(self.with_piece(ids))

    def continuation(self, ids):
        """Text of ids that go on from others: a space before its first word stays."""
        # SentencePiece drops it at the beginning of a text, so the text begins with a line feed.
        return self.sp.decode([self.line_feed, *self.with_piece(ids)])[1:]

    def with_piece(self, ids):
        """The ids that are the tokenizer's: a model may have more rows (padding) and choose one."""
        return [i for i in ids if i < self.vocab_size]

    def visible(self, ids):
        """Text of any ids for a person to look at, BOS and EOS written out."""
        text = b""
        for i in self.with_piece(ids):
            piece = self.sp.id_to_piece(i)
            byte = self.sp.is_byte(i)
            text += bytes([int(piece[3:5], 16)]) if byte else piece.replace("▁", " ").encode()
        return text.decode(errors="replace")

    def _encode(self, messages, answer, prefill=""):
        ids, trained = [self.bos_id], [False]
        text = ""  # since the last EOS: what lies between two special tokens is encoded as a whole
        for message in messages:
            text += f"<|{message['role']}|>\n"
            content = message["content"].strip()
            if message["role"] == "assistant":
                piece_ids = self._encode_segment(text + content, first=len(ids) == 1)
                untrained = after_lines(piece_ids, text.count("\n"), self.line_feed)
                ids += [*piece_ids, self.eos_id]
                trained += [False] * untrained + [True] * (len(piece_ids) - untrained + 1)
                text = "\n"
            else:
                text += content + "\n"
        if answer:
            text += "<|assistant|>\n" + prefill
        if text not in ("", "\n"):  # after the last EOS stands nothing
            piece_ids = self._encode_segment(text, first=len(ids) == 1)
            ids += piece_ids
            trained += [False] * len(piece_ids)
        return ids, trained

    def _encode_segment(self, text, first):
        # SentencePiece begins every text with "▁". transformers keeps it after BOS, and after EOS
        # only where the checkpoint says `legacy`. Every later segment begins with a line feed,
        # which never merges, so that the "▁" before it is a token of its own.
        piece_ids = self.sp.encode(text)
        return piece_ids if first or self.legacy else piece_ids[1:]


def after_lines(ids, lines, line_feed):
    """Index after the `lines`-th line feed.

    No piece contains a line feed, so counting them finds the end of a prefix without encoding it
    a second time (and encoding it alone would put a "▁" where there is none).
    """
    position = -1
    for _ in range(lines):
        position = ids.index(line_feed, position + 1)
    return position + 1


def tokenizer_config(folder):
    """`tokenizer_config.json` as a dict; empty where there is none."""
    path = Path(folder) / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    return config


def piece_scores(sp):
    """The score of each piece that merging can make."""
    return {
        sp.id_to_piece(i): sp.get_score(i)
        for i in range(sp.vocab_size())
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))
    }


