"""Text to token ids and back: byte-level BPE of the `tokenizers` library, so that any text round-trips exactly."""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_write
from jaxlm.data.files import reading
from jaxlm.data.special_tokens import ROLES, from_vocabulary, ids_of, read_special_tokens
from jaxlm.errors import UserError, one_line

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2 of every tokenizer trained here
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|endoftext|>")
PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
NAMES = {"bos": BOS_NAMES, "eos": EOS_NAMES, "pad": PAD_NAMES}

Item = TypeVar("Item")

# A text longer than this is tokenized in parts, so that a book in one file uses all threads and little memory, and no
# thread is left alone with a long last part.
PART_CHARACTERS = 2**14
CALL_CHARACTERS = 2**22  # of parts in one call of the library, whose answer takes some 50 bytes a character
# GPT-2's pattern splits the last character off a run of white space that a word follows. Where that is a line end, it
# is a word of its own. So a cut just before such a line end leaves every word, and every id, as it was.
_SAFE_CUT = re.compile(r"\n(?=\S)")
LONGEST_WORD = 1000  # characters that BPE is trained on in one word
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD},}}|(?<!\s)\s{{{LONGEST_WORD},}}")


class Tokenizer:
    """A `tokenizers.Tokenizer` without padding and truncation.

    To one trained here, its input is text only: "<bos>" is five characters. Of others, whose chat markers mean
    something, a special token's name in a text is that token, as in transformers.

    Attributes: `bos_id`, `eos_id`, `pad_id`, `vocab_size` (int): the largest id + 1; `end_ids` (tuple of int): the
    tokens that end a generated text, `eos_id` among them; `said` (dict): from `read_special_tokens`; `special_in_text`
    (set of str): the special tokens that are read as such in a text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, where: str = "tokenizer", said: Mapping[str, Any] | None = None
    ) -> None:
        """Raises UserError, which `where` begins, if `backend` has no token to begin or end a document with.

        Args:
          said: which tokens these are; without it, those of well-known names.
        """
        self._backend, self.said = backend, dict(said or {})
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # that is for training a model; a text has one list of ids here
        self._special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        plain = self._special <= {PAD, BOS, EOS} and "chat_template" not in self.said  # which writes tokens out
        self.special_in_text = set() if plain else self._special
        backend.encode_special_tokens = not self.special_in_text  # true: as characters; the flag is not in the JSON
        backend.no_padding()
        backend.no_truncation()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        self._ids = frozenset(vocabulary.values())
        bos, eos, pad = (self._find_role(role, vocabulary, where) for role in ROLES)
        for role, verb, found in (("bos", "begin", bos), ("eos", "end", eos)):
            if found is None:
                needed = f"it must contain one of {', '.join(NAMES[role])}, or data.{role}_token must name one"
                raise UserError(f"{where} has no token to {verb} a document with; {needed}")
        self.bos_id, self.eos_id, self.pad_id = (eos if found is None else found for found in (bos, eos, pad))
        ends = tuple(token for token in ids_of(self.said, "eos") if token in self._ids)
        self.end_ids = ends if self.eos_id in ends else (self.eos_id, *ends)

    def _find_role(self, role: str, vocabulary: Mapping[str, int], where: str) -> Any:
        """The id of the token that was said to be of a role, or else of the first well-known name; or None."""
        named: Any = self.said.get(f"{role}_token")
        if named and named not in vocabulary and role != "pad":  # padding teaches nothing: any token does
            raise UserError(f"{where} has no token {named}, its {role}_token; set data.{role}_token to one that it has")
        first = [vocabulary[named]] if named in vocabulary else []
        by_id = [token for token in ids_of(self.said, role) if token in self._ids]
        return next(iter(first + by_id + [vocabulary[name] for name in NAMES[role] if name in vocabulary]), None)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE of at most `vocab_size` tokens (>= 259), fewer where the text is too small for more merges."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        parts = (part for text in texts for whole in split_safely(text) for part in without_long_words(whole))
        backend.train_from_iterator(parts, trainer)
        return cls(backend)

    @staticmethod
    def outside_markers(text: str) -> str:
        """`text` without the special tokens of a tokenizer trained here, which are not to be learned as characters."""
        return re.sub("|".join([PAD, BOS, EOS]), "", text)

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer", said: Mapping[str, Any] | None = None) -> "Tokenizer":
        """The tokenizer whose `to_json` gave `text`. Raises UserError, which `where` begins, for anything else."""
        try:
            backend = tokenizers.Tokenizer.from_buffer(text.encode())
        except ValueError as error:
            reason = one_line(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
            raise UserError(f"{where} is not a tokenizer.json of the tokenizers library: {reason}") from error
        return cls(backend, where, said)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], name: str = "data.tokenizer_path", data: DataConfig | None = None
    ) -> "Tokenizer":
        """As `find`; a UserError where there is none."""
        found = cls.find(path, name, data)
        if found is None:
            problem = "holds no tokenizer.json" if os.path.isdir(Path(path).expanduser()) else "no such file"
            raise UserError(f"{name} ({path}): {problem}")
        return found

    @classmethod
    def find(cls, path: str | os.PathLike[str], name: str, data: DataConfig | None = None) -> "Tokenizer | None":
        """Reads a tokenizer.json and what is beside it, or those in a folder or its subfolder `tokenizer`.

        Args:
          data: its `bos_token`, `eos_token` and `pad_token` win over the files.

        Raises:
          UserError: it begins with `name`, the option; a file is unreadable, corrupt, or see `__init__`.
        """
        where, path = f"{name} ({path})", Path(path).expanduser()
        tokens = (data.bos_token, data.eos_token, data.pad_token) if data else ()
        chosen = {f"{role}_token": token for role, token in zip(ROLES, tokens, strict=False) if token is not None}
        for file in (path, path / "tokenizer.json", path / "tokenizer" / "tokenizer.json"):
            if os.path.isfile(file):  # unlike Path.is_file, no error where a name is too long or a folder closed
                with reading(where):
                    text = file.read_text(encoding="utf-8")
                return cls.from_json(text, where, read_special_tokens(file.parent, where) | chosen)
        with _LibraryErrors(f"{where}: vocab.json and merges.txt are not readable"):
            backend = from_vocabulary(path, where)
        return None if backend is None else cls(backend, where, read_special_tokens(path, where) | chosen)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `files` into a folder, each whole or not at all. Raises OSError where that is not possible."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            atomic_write(folder / name, text)

    def files(self) -> dict[str, str]:
        """{name: content} of tokenizer.json, and of tokenizer_config.json where anything was said; for `load`."""
        said = {"tokenizer_config.json": json.dumps(self.settings(), indent=2, sort_keys=True)} if self.said else {}
        return {"tokenizer.json": self.to_json(), **said}

    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json.

        A chat template is given the tokens that it names: with one, these are those that were said, as before.
        """
        roles = [role for role in ROLES if "chat_template" not in self.said or f"{role}_token" in self.said]
        named = {f"{role}_token": self.token(getattr(self, f"{role}_id")) for role in roles}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **self.said, **named}

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def agrees_with(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids, apart from the tokens that a template puts around it."""
        own, others = (json.loads(tokenizer.to_json()) | {"post_processor": None} for tokenizer in (self, other))
        return bool(own == others)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `files()`, in hexadecimal."""
        return hashlib.sha256("".join(self.files().values()).encode()).hexdigest()

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Finds special tokens in texts, and what looks like one of another tokenizer, such as `<|im_start|>`."""
        names = sorted(map(re.escape, self._special - {""}), key=len, reverse=True)
        return re.compile("|".join([r"<\|\w+\|>", *names]))

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def missing(self, rows: int) -> tuple[int, ...]:
        """The ids below `rows` that stand for no token: gaps, and a model's rows beyond its vocabulary."""
        return tuple(sorted(set(range(rows)) - self._ids))

    def token(self, token_id: int) -> str:
        """The token's text, such as "<bos>"."""
        return str(self._backend.id_to_token(token_id))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without <bos> and <eos>. Raises UserError where it cannot be tokenized."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text ({text[error.start]!r} at character {error.start}) is not valid Unicode") from error
        with _LibraryErrors(f"text ({text[:40]!r}) cannot be tokenized"):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text its ids as <bos> text <eos>, `dtype` [tokens]; runs on the library's own threads.

        Raises:
          UserError: one of them cannot be tokenized; the message has the reason, not the text.
        """
        split = split_safely if self._splits_safely else lambda text: iter([text])
        parts = ((number, part) for number, text in enumerate(texts) for part in split(text))
        begin, end = (np.array([token], self.dtype) for token in (self.bos_id, self.eos_id))
        documents = [[begin] for _ in texts]
        with _LibraryErrors("cannot be tokenized"):
            for batch in in_batches(parts, lambda part: len(part[1]), CALL_CHARACTERS):
                numbers, contents = zip(*batch, strict=True)
                found = self._backend.encode_batch_fast(contents, add_special_tokens=False)
                for number, encoding in zip(numbers, found, strict=True):
                    documents[number].append(_to_numpy(encoding.ids).astype(self.dtype))
        joined = [np.concatenate([*document, end]) for document in documents]
        if any(len(ids) == 2 and text.strip() for ids, text in zip(joined, texts, strict=True)):  # all words unknown,
            raise UserError("cannot be tokenized: the tokenizer has no token for anything in it")  # and no token for it
        return joined

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids, `dtype` [tokens], and the characters of each, int64 [tokens, 2]: [start, end).

        Raises:
          UserError: one of them cannot be tokenized; the message has the reason, not the text.
        """
        with _LibraryErrors("cannot be tokenized"):
            encodings = self._backend.encode_batch([*texts], add_special_tokens=False)
        return [
            (
                _to_numpy(encoding.ids).astype(self.dtype),
                _to_numpy([*chain.from_iterable(encoding.offsets)]).astype(np.int64).reshape(-1, 2),
            )
            for encoding in encodings
        ]

    def without_special(self, text: str) -> str:
        """`text` without what is read as special tokens in it."""
        return self._special_pattern.sub("", text) if self.special_in_text else text

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(sorted(map(re.escape, self.special_in_text - {""}), key=len, reverse=True)))

    def saying(self, said: Mapping[str, Any]) -> "Tokenizer":
        """The same tokenizer with more said of it, see `said`."""
        return Tokenizer.from_json(self.to_json(), said={**self.said, **said})

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`, with the `special` tokens or without; bytes that are not UTF-8 become U+FFFD."""
        texts = []
        for added, run in groupby(map(int, ids), self._decoded_wrongly.get):
            if added is None:
                texts.append(self._backend.decode([*run], skip_special_tokens=not special))
            elif special or added not in self._special:
                texts.append(added * len([*run]))
        return "".join(texts)

    @cached_property
    def _decoded_wrongly(self) -> dict[int, str]:
        """Added tokens that the library decodes to broken bytes: it reads letters such as é in them as one byte each
        (tokenizers 0.23.3, the decoder ByteLevel; findings/tokenizers-added-tokens-come-back-broken.sh).
        """
        added = {number: token.content for number, token in self._backend.get_added_tokens_decoder().items()}
        decoded = {number: self._backend.decode([number], skip_special_tokens=False) for number in added}
        return {number: text for number, text in added.items() if "\ufffd" in decoded[number].replace(text, "")}

    @cached_property
    def _splits_safely(self) -> bool:
        """Whether text is split into words as `train` does it, so that `split_safely` applies."""
        settings = json.loads(self.to_json())
        words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        tokens = settings["added_tokens"]
        within_lines = all(token["special"] and not token["lstrip"] and not token["rstrip"] for token in tokens)
        return (
            within_lines
            and settings["normalizer"] is None
            and (settings["pre_tokenizer"] or {}).items() >= words.items()
        )


class _LibraryErrors(AbstractContextManager[None]):
    """A context in which an error of `tokenizers` becomes a UserError, which `message` begins.

    That library raises a bare `Exception`, so just that class is meant: all others are defects and pass.
    """

    def __init__(self, message: str) -> None:
        self._message = message

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and kind is Exception:
            raise UserError(f"{self._message}: {one_line(error)}") from error


def without_long_words(text: str) -> list[str]:
    """`text`, cut within words of more than LONGEST_WORD characters: the time of training grows with their square."""
    half = LONGEST_WORD // 2  # a longer word covers a whole part of this size, in which there is no break
    if all(len(text[at : at + half].split(None, 1)) == 2 for at in range(0, len(text) - half + 1, half)):
        return [text]
    words = _LONG_WORD.finditer(text)
    cuts = [cut for word in words for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def _to_numpy(numbers: list[int]) -> np.ndarray:
    """uint32 [numbers]; the standard library reads a list several times as fast as numpy 2.4 does."""
    return np.asarray(array("I", numbers))


def split_safely(text: str, size: int = PART_CHARACTERS) -> Iterator[str]:
    """`text` in parts of `size` characters or somewhat more, cut where no token of byte-level BPE can span the cut."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + size):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def in_batches(items: Iterable[Item], characters: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """`items` in lists of about `limit` characters, more only where one item has more."""
    total = 0

    def number(item: Item) -> int:
        nonlocal total
        total += characters(item) + 16  # so that a batch of tiny texts ends too
        return total // limit

    return (list(batch) for _, batch in groupby(items, number))
