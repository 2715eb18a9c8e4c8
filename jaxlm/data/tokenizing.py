"""Documents to the files of a folder of tokens, with their progress; what a killed start has left is gone on with."""

import errno
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_write
from jaxlm.data.documents import SHOWN, Document, LeftOut
from jaxlm.data.encoding import encoded, fitted, learned_bytes
from jaxlm.data.shards import Counts, Shards
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

NOTES = "notes.json"  # the last of the files
SECONDS = 10  # between lines about progress
TOKEN_CHARACTERS = 4  # on average, of most languages and tokenizers

Report = Callable[[str], None]  # takes a line of the report


def tokenize(folder: Path, source: Source, tokenizer: Tokenizer, data: DataConfig, report: Report) -> None:
    """Writes the tokens of all parts into `folder`: what of tokens.py's list is not there yet.

    Raises:
      UserError: a document is bad, or none is left.
      OSError: there is no room for them.
    """
    folder.mkdir(exist_ok=True)
    parts = {name: Shards(folder, name, tokenizer.dtype) for name in source.parts}
    if (folder / NOTES).exists():  # all is there, but for the folder's name
        for shards in parts.values():
            shards.clear()
        return
    left_out, markers, choices, shares = dict(source.left_out), Counter[str](), [], list[str]()

    def lengths(documents: Iterator[Document]) -> Iterator[int]:
        return (0 if isinstance(found, UserError) else len(found.ids) for _, found in encoded(tokenizer, documents))

    if source.split is not None and source.split.pass_over_short(data.min_length, lengths):
        choices.append("long")
    _check_room(folder, source, tokenizer)
    for name, shards in parts.items():
        left_out[f"tokenizing {name}"] = untrained = LeftOut(data)
        with shards:
            _tokenize_part(shards, name, source, tokenizer, data, untrained, report)
        counts = shards.counts
        if not counts.documents:
            if untrained.first:
                raise UserError(f"no document of the {name} text can be tokenized: {untrained.first[0]}")
            raise UserError(f"no document of the {name} text can be learned; {'; '.join(untrained.lines(name))}")
        if counts.learned:
            learned = f"{counts.learned:,} of {counts.tokens:,} tokens are learned (data.loss_on {data.loss_on})"
            shares.append(f"{name}: {learned}")
        markers.update(counts.markers)
    lines = [line for part, counted in left_out.items() for line in counted.lines(part)]
    lines += [] if source.format.template is not None else _about_markers(tokenizer, markers)
    choices += ["special"] * any(marker in tokenizer.special_in_text for marker in markers)
    atomic_write(folder / NOTES, json.dumps({"lines": lines + shares, "choices": choices}))
    for shards in parts.values():
        shards.clear()


def _tokenize_part(
    shards: Shards,
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    untrained: LeftOut,
    report: Report,
) -> None:
    """Adds the documents that are not in `shards` yet; counts in `untrained` those that are left out."""
    counts = shards.counts
    untrained.go_on(counts.left_out)
    if counts.read:
        report(
            f"tokenizing {name}: {counts.read:,} documents are done, by a start before this one; goes on behind them"
        )
    unread = islice(source.parts[name](), counts.read, None)
    documents = with_progress(unread, f"tokenizing {name}", report, source.characters(name), counts)
    for document, found in encoded(tokenizer, documents):
        if isinstance(found, UserError):
            untrained.add(UserError(f"{document.place} {found}"))
        elif fits := fitted(document, found, data, untrained):
            shards.add(fits, learned_bytes(tokenizer, document, fits))
            counts.markers.update(tokenizer.markers.findall(document.text))
        if shards.passed(document):
            counts.left_out = untrained.counts()
            shards.keep()
    counts.left_out = untrained.counts()
    shards.finish()


def _check_room(folder: Path, source: Source, tokenizer: Tokenizer) -> None:
    """Raises OSError if the disk has less room than the tokens usually take, as far as the text's size is known."""
    characters = sum(source.characters(name) or 0 for name in source.parts)
    token_bytes = tokenizer.dtype.itemsize + (source.format.kind != "text")
    needed = characters // TOKEN_CHARACTERS * token_bytes - sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        wanted = f"the tokens take about {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, wanted)


def _about_markers(tokenizer: Tokenizer, markers: Counter[str]) -> Iterator[str]:
    """Lines about special tokens that stand in plain text."""
    tokens = Counter({marker: count for marker, count in markers.items() if marker in tokenizer.special_in_text})
    for found, what in ((tokens, "each read as that token"), (markers - tokens, "read as characters, not as tokens")):
        if found:
            most = ", ".join(f"{marker} ({count:,})" for marker, count in found.most_common(SHOWN))
            cure = "data.document_separator splits documents at one"
            yield f"{found.total():,} markers stand in the text: {most}; {what} ({cure})"


def with_progress(
    documents: Iterable[Document], what: str, report: Report, size: int | None, done: Counts
) -> Iterator[Document]:
    """`documents`, with a bar on stderr if that is a terminal, else with a line every SECONDS.

    Args:
      size: about how many characters there are in all; None: that is not known.
      done: what comes before `documents`.
    """
    from tqdm import tqdm

    before, at, begin = done.characters, done.characters, 0.0
    with tqdm(None, what, size, initial=at, unit=" characters", unit_scale=True, disable=None, leave=False) as bar:
        for number, document in enumerate(documents, done.read + 1):
            begin = begin or (last := time.monotonic())  # what was done before has been read by now
            yield document
            bar.update(len(document.text))
            at += len(document.text)
            if bar.disable and (now := time.monotonic()) > last + SECONDS:
                rate, last = (at - before) / (now - begin), now
                of, left = "", ""
                if size is not None:
                    of = f" of {size / 1e6:,.0f}"
                    left = f", about {tqdm.format_interval(max(0, size - at) / rate)} left"
                found = f"{number:,} documents, {at / 1e6:,.0f}{of} million characters"
                report(f"{what}: {found}, {rate / 1e6:.2f} million a second{left}")
