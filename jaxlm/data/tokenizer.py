"""Text to token ids and back: byte-level BPE on the `tokenizers` library, so that any text round-trips exactly."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.errors import UserError, one_line

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2 of every tokenizer trained here
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|endoftext|>")
PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")

# A text longer than this is tokenized in parts, so that a book in one file uses all threads and little memory.
PART_CHARACTERS = 2**18
# In GPT-2's division into words, a run of white space before something else gives up its last character; where that
# is a line end, it stands alone. So a cut just before such a line end leaves every word, and every id, as it was.
_SAFE_CUT = re.compile(r"\n(?=\S)")

# The library reports a malformed file with a bare `Exception`; there is nothing narrower to name.
_LibraryError = Exception


class Tokenizer:
    """A `tokenizers.Tokenizer` that treats its input as text only: no markup, no padding, no truncation.

    Attributes: `bos_id`, `eos_id`, `pad_id` (int).
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "tokenizer") -> None:
        """Raises UserError where `backend` has no token that begins or ends a document; `where` begins the message."""
        self._backend = backend
        backend.encode_special_tokens = True  # "<bos>" in a text is five characters; the flag is not kept in the JSON
        backend.no_padding()
        backend.no_truncation()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps; what counts is the largest

        def find(names: Sequence[str]) -> int | None:
            return next((vocabulary[name] for name in names if name in vocabulary), None)

        bos, eos, pad = find(BOS_NAMES), find(EOS_NAMES), find(PAD_NAMES)
        if bos is None or eos is None:
            kind, names = ("begin", BOS_NAMES) if bos is None else ("end", EOS_NAMES)
            raise UserError(
                f"{where} has no token to {kind} a document with; it must contain one of {', '.join(names)}"
            )
        self.bos_id, self.eos_id, self.pad_id = bos, eos, eos if pad is None else pad

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
        backend.train_from_iterator((part for text in texts for part in split_safely(text)), trainer)
        return cls(backend)

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer") -> "Tokenizer":
        """The tokenizer whose `to_json` gave `text`. Raises UserError, which `where` begins, for anything else."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text), where)
        except UserError:
            raise
        except _LibraryError as error:
            raise UserError(f"{where} is not a tokenizer.json of the tokenizers library: {one_line(error)}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str = "data.tokenizer_path") -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder (directly, or in its subfolder `tokenizer`).

        Raises:
          UserError: missing, unreadable or corrupt file, or one without tokens that begin and end a document; its
            message begins with `name`, the option that the path came from.
        """
        where, path = f"{name} ({path})", Path(path).expanduser()
        folder = os.path.isdir(path)  # Path's own would raise where a name is too long, or a folder is closed to us
        candidates = [path / "tokenizer.json", path / "tokenizer" / "tokenizer.json"] if folder else [path]
        file = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
        if file is None:
            raise UserError(f"{where}: " + ("holds no tokenizer.json" if folder else "no such file"))
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read: {one_line(error)}") from error
        return cls.from_json(text, where)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes folder/tokenizer.json, whole or not at all. Raises OSError where that is not possible."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".tokenizer.json.{os.getpid()}"
        with part.open("w", encoding="utf-8") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / "tokenizer.json")

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def agrees_with(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids; tokens that a template puts around it are left out of account."""
        settings = [json.loads(tokenizer.to_json()) for tokenizer in (self, other)]
        return len({json.dumps(each | {"post_processor": None}, sort_keys=True) for each in settings}) == 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `to_json()`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def token(self, token_id: int) -> str:
        """How the token is written, such as "<bos>"."""
        return str(self._backend.id_to_token(token_id))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without <bos> and <eos>. Raises UserError where it cannot be written as UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text ({text[error.start]!r} at character {error.start}) is not valid Unicode") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text its ids as <bos> text <eos>, `dtype` [tokens]; runs on the library's own threads.

        Raises:
          UserError: one of them cannot be tokenized; it says why, not which.
        """
        parts = [split_safely(text) if self._splits_safely else [text] for text in texts]
        flat = [part for each in parts for part in each]
        try:
            encodings = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        except _LibraryError as error:
            raise UserError(f"cannot be tokenized: {one_line(error)}") from error
        documents = []
        for text, each in zip(texts, parts, strict=True):
            ids = [self.bos_id]
            for _ in each:
                ids += next(encodings).ids
            if len(ids) == 1 and text.strip():  # as a vocabulary without a token for what is unknown has it
                raise UserError("cannot be tokenized: the tokenizer has no token for anything in it")
            documents.append(np.array([*ids, self.eos_id], self.dtype))
        return documents

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def _splits_safely(self) -> bool:
        """Whether text is cut into words as `train` has it, for which `split_safely` holds."""
        settings = json.loads(self.to_json())
        words = settings["pre_tokenizer"] or {}
        return (
            settings["normalizer"] is None
            and all(token["special"] for token in settings["added_tokens"])
            and [words.get(key) for key in ("type", "add_prefix_space", "use_regex")] == ["ByteLevel", False, True]
        )


def split_safely(text: str, size: int = PART_CHARACTERS) -> list[str]:
    """`text` in parts of `size` characters or somewhat more, cut only where no token of `train`'s kind can reach."""
    parts, start = [], 0
    while cut := _SAFE_CUT.search(text, start + size):
        parts.append(text[start : cut.start()])
        start = cut.start()
    return [*parts, text[start:]]
