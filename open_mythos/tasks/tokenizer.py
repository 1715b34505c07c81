"""Tokenizers: bytes, byte-pair encodings trained here, and byte-level ones loaded from tokenizer.json, all lossless;
and words of a fixed vocabulary.

All are saved as the ``tokenizer.json`` of Hugging Face's ``tokenizers``, a package that byte-pair encodings need.
"""

import difflib
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from open_mythos import files
from open_mythos.arguments import checked
from open_mythos.fields import must
from open_mythos.install import missing

FILE = "tokenizer.json"
MOST_TOKENS = 1 << 16  # maximum vocabulary of a tokenizer that is trained here
MOST_IDS = 1 << 22  # maximum vocabulary of any tokenizer
_SHAPE = {"model": {"vocab": (dict, list), "merges?": (list, type(None))}}
END, PADDING = "<eos>", "<pad>"  # names of token 0, where it ends documents and where it is only padding
CONFIG, TEMPLATE, END_OF_ANSWER = "tokenizer_config.json", "chat_template.jinja", "<end>"
_WORD = r"'s(?!\w)|\w+|[^\w\s]"
_FIRST = re.compile(r"(?:^|(?<=[.?] ))[a-z]")  # first letter of a sentence
_APOSTROPHE = {"type": "Replace", "pattern": {"String": "\u2019"}, "content": "'"}
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_ALIKE = 0.5  # minimum similarity (difflib ratio) of a word that an error suggests
_FACTS_AND_QUESTION = """\
{%- set said = messages | selectattr("role", "equalto", "user") | map(attribute="content") | join(" ") | trim -%}
{%- for sentence in said.replace("?", "?|").replace(".", ".|").split("|") if sentence -%}
{%- if loop.last or not sentence.endswith("?") %}{{ sentence }}{% endif -%}
{%- endfor -%}
"""


@checked
class Tokenizer:
    """Text by UTF-8 bytes: byte b is token 1 + b.

    Args:
        ends: whether token 0 ends documents.

    Attributes:
        pieces: the bytes that each token stands for; none for token 0.
        eos: the token that ends a document, and that encoding a text never gives; None if there is none.
        asks: the only token after which a model answers; None for a model that continues any text.
        template: function from a conversation to a prompt's tokens; None for a model that continues any text.
    """

    asks: int | None = None
    template: Callable[[list[dict[str, str]]], list[int]] | None = None

    def __init__(self, ends: bool = False) -> None:
        self.pieces = [b"", *(bytes([b]) for b in range(256))]
        self.eos = 0 if ends else None

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest unsigned integer type that holds every token."""
        return np.uint16 if len(self.pieces) <= 1 << 16 else np.uint32

    @checked
    def encode_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, (N,) of :attr:`dtype`; errors as :meth:`encode`."""
        return [np.frombuffer(content, np.uint8) + np.uint16(1) for content in _contents(texts)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of all texts, one after the other, (N,).

        Raises:
            ValueError: for a single string, which would be read as a list of its characters, and for a text that
                cannot be written in UTF-8.
        """
        return np.concatenate([np.empty(0, self.dtype), *self.encode_each(texts)])

    @checked
    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: for an id that is no token of this tokenizer.
        """
        return b"".join(self.pieces[i] for i in check_tokens(ids, len(self.pieces))).decode("utf-8", "replace")

    @checked
    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` into ``directory``."""
        files.write(Path(directory, FILE), self.to_json())

    def to_json(self) -> str:
        """The content of the file that :meth:`save` writes."""
        characters = {b: character for character, b in _byte_of_character().items()}
        return _as_json(END if self.eos == 0 else PADDING, [characters[b] for b in range(256)], [])


@checked
class BytePairs(Tokenizer):
    """A byte-level byte-pair encoding such as GPT-2's, or SentencePiece's, which puts a space before a text.

    Args:
        text: content of its tokenizer.json.
        eos: name of the token that ends documents; None if there is none.

    Raises:
        ImportError: naming the extra to install, without ``tokenizers``.
        ValueError: if the bytes of its tokens cannot be told from their names, or ``eos`` is not in its vocabulary.
    """

    def __init__(self, text: str, eos: str | None) -> None:
        self._text, self._bpe = text, _tokenizers().Tokenizer.from_str(text)
        self._bpe.no_truncation()  # both may be saved in the file, and are for batches of some other program
        self._bpe.no_padding()
        self._bpe.encode_special_tokens = True  # in a text, "<eos>" is five characters
        known = self._bpe.get_vocab(with_added_tokens=True)
        added = self._bpe.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        piece = _reader(f"{self._bpe.pre_tokenizer} {self._bpe.decoder}")
        last = max(known.values())
        must(last < MOST_IDS, f"its token ids go up to {last}, too many for a model's vocabulary; use another one")
        self.pieces = [b""] * (1 + last)
        for name, i in known.items():
            if i not in special and name not in (END, PADDING):
                self.pieces[i] = piece(name, i in added)
        must(eos is None or eos in known, f"its vocabulary has no {eos!r}, which should end documents")
        self.eos = None if eos is None else known[eos]

    @classmethod
    @checked
    def trained(cls, n_tokens: int, texts: Iterable[str], ends: bool = False) -> Self:
        """Train an encoding of at most ``n_tokens`` tokens, token 0 included, on ``texts``."""
        tokenizers = _tokenizers()
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=n_tokens - 1, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        known, first = bpe.get_vocab(), END if ends else PADDING
        merges = json.loads(bpe.to_str())["model"]["merges"]
        return cls(_as_json(first, sorted(known, key=known.__getitem__), merges), END if ends else None)

    @checked
    def encode_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._bpe.encode_batch_fast([one.decode() for one in _contents(texts)], add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in encoded]

    def to_json(self) -> str:
        return self._text


@checked
class WordLevel(Tokenizer):
    """Words and punctuation marks of a fixed vocabulary, case-insensitive. A question mark asks for an answer.

    Case matters only between words that differ in nothing else, such as the article a and a register A.

    Args:
        words: by token, ``<pad>`` and ``<end>`` first.
        ends: whether ``<end>`` follows an answer; else an answer is one word.
    """

    def __init__(self, words: Sequence[str], ends: bool = False) -> None:
        must(tuple(words[:2]) == (PADDING, END_OF_ANSWER), f"its words should begin with {PADDING}, {END_OF_ANSWER}")
        self.words, self.pieces = tuple(words), [b"", b"", *(word.encode() for word in words[2:])]
        self.eos = 1 if ends else None
        self._exact = {word: i for i, word in enumerate(words) if i > 1}
        self._folded = {word.lower(): i for word, i in self._exact.items()}
        must("?" in self._exact and "." in self._exact, "it has no token for . or ?, so nothing can be asked")
        self.asks, self.template = self._exact["?"], self._prompt

    @checked
    def encode_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([self._token(word) for word in _words(text)], self.dtype) for text in texts]

    def _token(self, word: str) -> int:
        found = self._exact.get(word, self._folded.get(word.lower()))
        if found is None:
            alike = difflib.get_close_matches(word.lower(), self._folded, 1, _ALIKE)
            if alike:
                hint = f"the nearest is {self.words[self._folded[alike[0]]]!r}"
            else:
                hint = "besides words there are " + " ".join(known for known in self._exact if not known.isalnum())
            raise ValueError(f"there is no word {word!r} here; {hint}")
        return found

    @checked
    def decode(self, ids: Iterable[int]) -> str:
        said = " ".join(self.words[i] for i in check_tokens(ids, len(self.pieces)) if i > 1)
        return _FIRST.sub(lambda found: found[0].upper(), re.sub(r" (?=[.,:?]|'s)", "", said))

    @checked
    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json``, and beside it the two files that a conversation in ``transformers`` needs."""
        super().save(directory)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PADDING,
            "clean_up_tokenization_spaces": False,
        }
        config |= {"eos_token": END_OF_ANSWER} if self.eos else {}
        files.write_json(Path(directory, CONFIG), config)
        files.write(Path(directory, TEMPLATE), _FACTS_AND_QUESTION)

    def to_json(self) -> str:
        alike = {word for word, i in self._exact.items() if self._folded[word.lower()] != i}
        alike |= {self.words[self._folded[word.lower()]] for word in alike}
        folded = [
            {"type": "Replace", "pattern": {"Regex": rf"(?<!\w)(?i:{word})(?!\w)"}, "content": word}
            for word in self._exact
            if word.isalpha() and word not in alike
        ]
        names = [{"id": i, "content": name, "special": True, **_PLAIN} for i, name in enumerate(self.words[:2])]
        return json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": names,
            "normalizer": {"type": "Sequence", "normalizers": [_APOSTROPHE, *folded]},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Removed", "invert": True},
            "post_processor": None, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {w: i for i, w in enumerate(self.words)}},
        }, ensure_ascii=False)  # fmt: skip

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of the user's messages, without questions but the last: in training, no facts follow a question."""
        sentences, sentence = list[list[int]](), list[int]()
        for message in messages:
            if message["role"] == "user":
                for token in self.encode([message["content"]]).tolist():
                    sentence.append(token)
                    if token in (self.asks, self._exact["."]):
                        sentences.append(sentence)
                        sentence = []
                must(not sentence, "end each sentence with . or ?, which tells facts from questions")
        last = len(sentences) - 1
        return [token for i, one in enumerate(sentences) if i == last or one[-1] != self.asks for token in one]


def check_tokens(ids: Iterable[int], n: int) -> list[int]:
    """``ids`` as a list; ValueError unless all are integers in [0, n)."""
    found = list(ids)
    for i in found:
        try:
            known = 0 <= operator.index(i) < n
        except TypeError:
            known = False
        must(known, f"{i!r:.40} in ids is not a token id; those of this vocabulary are 0 to {n - 1}")
    return found


def _words(text: str) -> list[str]:
    return re.findall(_WORD, text.replace("\u2019", "'"))


def _contents(texts: Sequence[str]) -> list[bytes]:
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text cannot be encoded in UTF-8: it contains the unpaired surrogate {error.object[error.start]!r}"
        ) from None


@checked
def tokenizer(kind: str, texts: Iterable[str], ends: bool = False) -> Tokenizer:
    """Make the tokenizer ``"bytes"``, train ``"bpe:N"`` with N tokens on ``texts``, or load one from a folder.

    Args:
        kind: one of these names, or a folder with a ``tokenizer.json``.
        texts: to train on.
        ends: whether token 0 ends documents; a folder's tokenizer says that itself.

    Raises:
        ValueError: for any other name, an N out of range, or a file that is not a tokenizer.
        ImportError: naming the extra to install, without ``tokenizers``.
    """
    if kind == "bytes":
        return Tokenizer(ends)
    if Path(kind, FILE).is_file():
        return load(kind)
    name, _, count = kind.partition(":")
    known = name == "bpe" and count.isdecimal() and 257 <= int(count) <= MOST_TOKENS
    use = f"use 'bytes', or 'bpe:N' with N from 257 to {MOST_TOKENS}, or a folder with a {FILE}"
    must(known, f"tokenizer={kind!r}; {use}")
    return BytePairs.trained(int(count), texts, ends)


@checked
def load(directory: str | Path) -> Tokenizer:
    """Load the tokenizer in ``directory``: of a model saved here, or a byte-level one of Hugging Face.

    The token that ends documents is its ``<eos>``, or the ``eos_token`` of a ``tokenizer_config.json`` beside it.

    Raises:
        ValueError: naming the file, if it is missing, damaged, or not byte-level.
        ImportError: naming the extra to install, without ``tokenizers``.
    """
    path = Path(directory, FILE)
    must(path.is_file(), f"{path} is missing, so text cannot be tokenised; copy it there from the original model")
    try:
        text = files.read_text(files.own(path))
        model = files.parse_json(text, str(path), _SHAPE)["model"]
        config = path.with_name(CONFIG)
        said = files.read_json(files.own(config), {"eos_token?": (str, dict, type(None))}) if config.is_file() else {}
        end = said.get("eos_token")
        if isinstance(end, dict):
            end = files.shaped(end, {"content": str}, f"{config}: eos_token")["content"]
        if model.get("type") == "WordLevel" and END_OF_ANSWER in (vocab := model["vocab"]):
            words = sorted(vocab, key=vocab.__getitem__)
            must([vocab[word] for word in words] == list(range(len(words))), "its token ids are not 0, 1, 2 and so on")
            return WordLevel(words, end == END_OF_ANSWER)  # exports name "<pad>" as eos_token if answers have no end
        if not model.get("merges") and len(model["vocab"]) == 257:
            return Tokenizer(END in model["vocab"])
        return BytePairs(text, END if END in model["vocab"] else end)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"{path} cannot be used: {error}; replace it with the tokenizer of the model") from error


def _as_json(first: str, names: Sequence[str], merges: Sequence[Any]) -> str:
    """Make a tokenizer.json of byte-level pieces ``names``, numbered from 1 on; token 0 is called ``first``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": 0, "content": first, "special": True, **_PLAIN}],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate([first, *names])}, "merges": merges},
    }, ensure_ascii=False)  # fmt: skip


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing("a tokenizer other than 'bytes' needs tokenizers", "tasks") from error
    return tokenizers


def _reader(means: str) -> Callable[[str, bool], bytes]:
    """Function from a token's name, and whether it is an added token, to its bytes; ``means``: how text is split."""
    is_byte_level, byte_of = "ByteLevel" in means, _byte_of_character()
    known = is_byte_level or "ByteFallback" in means
    must(known, "it is neither byte-level BPE nor SentencePiece with byte fallback; use another one")

    def byte_level(name: str, is_added: bool) -> bytes:
        if is_added:  # text as it is
            return name.encode()
        must(set(name) <= byte_of.keys(), f"token {name!r} is not spelled in bytes, as byte-level BPE requires")
        return bytes(byte_of[character] for character in name)

    def sentence_piece(name: str, is_added: bool) -> bytes:
        is_byte = len(name) == 6 and name.startswith("<0x")
        return bytes.fromhex(name[3:5]) if is_byte else name.replace("\u2581", " ").encode()

    return byte_level if is_byte_level else sentence_piece


def _byte_of_character() -> dict[str, int]:
    """Map characters to bytes as GPT-2: printable Latin-1 bytes as themselves, the others as U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
