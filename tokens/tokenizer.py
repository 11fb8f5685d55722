"""The Tulu chat format: messages in, token ids and loss mask out.

A conversation as text, with ^ under what is trained, byte by byte as in Tulu 2 (open-instruct
finetune.py; EasyLM data.py):

    <s> <|user|>⏎What is 2+2?⏎<|assistant|>⏎4</s>⏎<|user|>⏎…
                                            ^^^^^

`<s>` and `</s>` are put in as ids; role tags are plain text. For another chat format, change
`Tokenizer._encode` here, for our programs; `CHAT_TEMPLATE` in for_transformers.py, for
transformers and vLLM (tests/tokens/test_tokenizer.py checks that both give the same ids); and
`prompt_ids` in evals/harness.py. A prompt has to end in a line feed, which never merges.
"""

from pathlib import Path

import sentencepiece

from program.errors import InputError
from tokens.bpe import piece_scores
from tokens.folder import pad_token_id, tokenizer_config, tokenizer_file
from tokens.from_json import model_from_json

ROLES = ("system", "user", "assistant")


class Tokenizer:
    """Llama's SentencePiece model with the Tulu chat format around it.

    `folder` holds `tokenizer.model`, or a `tokenizer.json` of which one is made, and, if there is
    one, `tokenizer_config.json`, whose `legacy` decides whether "▁" follows EOS. `model` is the
    serialised SentencePiece model. Raises `InputError` for a tokenizer of another kind.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path, config = tokenizer_file(folder), tokenizer_config(folder)
        is_json = self.path.suffix == ".json"
        self.model = model_from_json(self.path, config) if is_json else self.path.read_bytes()
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(self.model)
            self.sp.id_to_piece(list(range(self.sp.vocab_size())))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: not a SentencePiece model ({error})") from None
        self.legacy = bool(config.get("legacy"))
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = self.sp.vocab_size()
        self.line_feed = self.sp.piece_to_id("<0x0A>")
        self.check_like_llama()

    def check_like_llama(self) -> None:
        """Raise `InputError` where the model lacks a property that `encode` relies on."""
        space, sample = self.sp.piece_to_id("▁"), "  ａ ﬁ\t\r  é "
        scores = piece_scores(self.sp)
        for problem, present in (
            ("has no BOS or no EOS", min(self.bos_id, self.eos_id) < 0),
            ("has no byte fallback", not self.sp.is_byte(self.line_feed)),
            ("has pieces that contain a line feed", any("\n" in piece for piece in scores)),
            # BPE scores a piece by the number of its merge, a unigram model by a log-probability.
            ("is not BPE", any(score % 1 for score in scores.values())),
            ("does not begin a text with '▁'", self.sp.encode("\n") != [space, self.line_feed]),
            ("normalises its input", self.sp.decode(self.sp.encode(sample)) != sample),
        ):
            if present:
                raise InputError(
                    f"{self.path}: {problem}, expected a model like Llama's "
                    "(BPE, byte fallback, identity normalisation, dummy prefix)"
                )

    def check_fits(self, rows: int) -> None:
        """Raise `InputError` where a token id would have no row in a model's embedding."""
        pad = pad_token_id(self.path.parent)
        if pad is not None and not -rows <= pad < rows:
            raise InputError(
                f"{self.path.parent}/config.json: pad_token_id is {pad}, expected one of the "
                f"{rows} rows of the model's embedding (vocab_size)"
            )
        if self.vocab_size > rows:
            raise InputError(
                f"{self.path}: {self.vocab_size} pieces, expected at most the {rows} rows of the "
                "model's embedding (vocab_size)"
            )

    def encode(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """`(ids, trained)` of a conversation, of the same length.

        The content and the EOS of every assistant message are trained, unless its `weight` is 0
        (see tokens/shapes.py). A user's "Hi" and an assistant's "Hello!" (⏎ is the piece <0x0A>):

            <s>  ▁<     |  user      |      >   ⏎     Hi   ⏎
              1  529  29989  1792  29989  29958  13  18567  13
              .    .      .     .      .      .   .      .   .
              <      |  ass  istant      |      >   ⏎  Hello      !  </s>
          29966  29989  465   22137  29989  29958  13  10994  29991     2
              .      .    .       .      .      .   .      ^      ^     ^
        """
        return self._encode(messages, answer=False)

    def prompt(self, messages: list[dict], prefill: str = "") -> list[int]:
        """Token ids up to where the next answer begins: they end in `<|assistant|>⏎`.

        prefill: the beginning of the answer, put into the assistant's mouth.
        """
        return self._encode(messages, answer=True, prefill=prefill)[0]

    def raw(self, text: str) -> list[int]:
        """Token ids of BOS and a text to be continued as it is, without the chat format."""
        return [self.bos_id, *self.sp.encode(text)]

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids; BOS, EOS and ids without a piece are left out."""
        return self.sp.decode(self.with_piece(ids))

    def continuation(self, ids: list[int]) -> str:
        """Text of ids that follow others: a space before the first word is kept."""
        # SentencePiece drops it at the beginning of a text, so the text begins with a line feed.
        return self.sp.decode([self.line_feed, *self.with_piece(ids)])[1:]

    def with_piece(self, ids: list[int]) -> list[int]:
        """The ids that have a piece: a model with a padded vocabulary may generate others."""
        return [i for i in ids if i < self.vocab_size]

    def visible(self, ids: list[int]) -> str:
        """Text of any ids for a person to read, with BOS and EOS written out."""
        text = b""
        for i in self.with_piece(ids):
            piece = self.sp.id_to_piece(i)
            byte = self.sp.is_byte(i)
            text += bytes([int(piece[3:5], 16)]) if byte else piece.replace("▁", " ").encode()
        return text.decode(errors="replace")

    def _encode(self, messages, answer, prefill=""):
        ids, trained = [self.bos_id], [False]

        def add(piece_ids, mark):
            ids.extend(piece_ids)
            trained.extend([mark] * len(piece_ids))

        text = ""  # since the last special token: what lies between two is encoded as a whole
        for message in messages:
            text += f"<|{message['role']}|>\n"
            content = message["content"].strip()
            if message["role"] == "assistant":
                piece_ids = self._encode_segment(text + content, first=len(ids) == 1)
                n = length_of_lines(piece_ids, text.count("\n"), self.line_feed)
                add(piece_ids[:n], False)
                mark = bool(message.get("weight", 1))
                add(piece_ids[n:], mark)
                add([self.eos_id], mark)
                text = "\n"
            else:
                text += content + "\n"
        if answer:
            text += "<|assistant|>\n" + prefill
        if text not in ("", "\n"):  # nothing follows the last EOS
            add(self._encode_segment(text, first=len(ids) == 1), False)
        return ids, trained

    def _encode_segment(self, text, first):
        # SentencePiece begins every text with "▁". transformers keeps it after BOS, and after EOS
        # only where the checkpoint says `legacy`. Every later segment begins with a line feed,
        # which never merges, so the "▁" before it is a token of its own.
        piece_ids = self.sp.encode(text)
        return piece_ids if first or self.legacy else piece_ids[1:]


def length_of_lines(ids: list[int], lines: int, line_feed: int) -> int:
    """The number of ids that the first `lines` lines of an encoded text take.

    No piece contains a line feed, so counting line feeds finds where a prefix of the text ends.
    Encoding the prefix would take time, and encoding the rest alone would put a "▁" before it.
    """
    end = 0
    for _ in range(lines):
        end = ids.index(line_feed, end) + 1
    return end
