"""Documents to tokens in shards, with their progress, and shards to the files of a folder of tokens.

What a killed start has left is gone on with, and processes that need the same tokens share the work: each reads all of
the text, and tokenizes the shards that no other is at.
"""

import errno
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_write
from jaxlm.data.documents import SHOWN, Document, LeftOut
from jaxlm.data.encoding import encoded, fitted, learned_bytes
from jaxlm.data.shards import Counts, Pass, Shards
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

NOTES = "notes.json"  # the last of the files
SECONDS = 10  # between lines about progress
TOKEN_CHARACTERS = 4  # on average, of most languages and tokenizers

Report = Callable[[str], None]  # takes a line of the report


class Made(NamedTuple):
    """Shards that are whole: those of each part, how many it has, and choices as of `tokens.Prepared`."""

    parts: dict[str, tuple[Shards, int]]
    choices: list[str]


def make_shards(folder: Path, source: Source, tokenizer: Tokenizer, data: DataConfig, report: Report) -> Made:
    """All shards of `source`: tokenized here, unless they are there or another process does it.

    Raises:
      UserError: a document is bad.
      OSError: there is no room for them; FileNotFoundError: another process has moved or removed the folder.
    """
    lengths = partial(_lengths, tokenizer)
    passed_over = source.split is not None and source.split.pass_over_short(data.min_length, lengths)
    _check_room(folder, source, tokenizer)
    parts = {name: Shards(folder, name, tokenizer.dtype) for name in source.parts}
    numbers = _make_shards(parts, source, tokenizer, data, report)
    everything = [(parts[name], i) for name, number in numbers.items() for i in range(number)]
    while missing := [(shards, i) for shards, i in everything if not shards.is_whole(i)]:
        shards, first = missing[0]
        report(f"tokenizing: waits for another process, which is at shard {first} of {shards.split}")
        for shards, i in missing:
            with shards.claimed(i, blocking=True):
                pass
        if not all(shards.is_whole(i) for shards, i in missing):  # it was ended
            _make_shards(parts, source, tokenizer, data, report)
    return Made({name: (shards, numbers[name]) for name, shards in parts.items()}, ["long"] * passed_over)


def _lengths(tokenizer: Tokenizer, documents: Iterator[Document]) -> Iterator[int]:
    return (0 if isinstance(found, UserError) else len(found.ids) for _, found in encoded(tokenizer, documents))


def _make_shards(
    parts: Mapping[str, Shards], source: Source, tokenizer: Tokenizer, data: DataConfig, report: Report
) -> dict[str, int]:
    """Those of each part that are not whole, and that no other process is at; how many each has in all."""
    with ExitStack() as opened:
        works = {name: Pass(shards, data, opened) for name, shards in parts.items()}
        done = Counts()
        for work in works.values():
            done.read, done.characters = done.read + work.done.read, done.characters + work.done.characters
        if done.read:
            by = "by a start before this one or by another process"
            report(f"tokenizing: {done.read:,} documents are done, {by}; goes on with the others")
        unread = (document for document in source.documents() if not works[document.part].is_done())
        documents = with_progress(unread, "tokenizing", report, _characters(source), done)
        own = (document for document in documents if works[document.part].takes(document))
        for document, found in encoded(tokenizer, own):
            work = works[document.part]
            shard = work.shard
            if isinstance(found, UserError):
                shard.left_out.add(UserError(f"{document.place} {found}"))
            elif fits := fitted(document, found, data, shard.left_out):
                shard.add(fits, learned_bytes(tokenizer, document, fits))
                if markers := tokenizer.markers.findall(document.text):
                    shard.counts.markers.update(markers)
            work.ended(document)
        for work in works.values():
            work.close()
    return {name: work.number for name, work in works.items()}


def _characters(source: Source) -> int | None:
    """About how many all parts have; None: that is not known."""
    known = [source.characters(name) for name in source.parts]
    return None if None in known else sum(filter(None, known))


def notes(made: Made, source: Source, tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    """What notes.json of tokens.py holds, once all of `source` has been read.

    Raises:
      UserError: no document of a part is left.
    """
    markers = Counter[str]()
    lines, shares = [line for part, counted in source.left_out.items() for line in counted.lines(part)], list[str]()
    for name, (shards, number) in made.parts.items():
        parts = [shards.counts(i) for i in range(number)]
        untrained = LeftOut(replace(data, document_separator=None))  # at which they are split by now
        for counts in parts:
            untrained.include(counts.left_out)
            markers.update(counts.markers)
        if not any(counts.documents for counts in parts):
            if untrained.first:
                raise UserError(f"no document of the {name} text can be tokenized: {untrained.first[0]}")
            raise UserError(f"no document of the {name} text can be learned; {'; '.join(untrained.lines(name))}")
        lines += untrained.lines(f"tokenizing {name}")
        if learned := sum(counts.learned for counts in parts):
            of = f"{learned:,} of {sum(counts.tokens for counts in parts):,} tokens are learned"
            shares.append(f"{name}: {of} (data.loss_on {data.loss_on})")
    lines += [] if source.format.template is not None else _about_markers(tokenizer, markers)
    special = any(marker in tokenizer.special_in_text for marker in markers)
    return {"lines": lines + shares, "choices": made.choices + ["special"] * special}


def join(folder: Path, made: Made, text: dict[str, Any]) -> None:
    """Turns the shards in `folder`, of which `text` are the `notes`, into the files that tokens.py describes.

    Raises:
      UserError: what an earlier start has left is damaged.
    """
    for shards, number in made.parts.values():
        shards.join(number)
    atomic_write(folder / NOTES, json.dumps(text))


def _check_room(folder: Path, source: Source, tokenizer: Tokenizer) -> None:
    """Raises OSError if the disk has less room than the tokens usually take, as far as the text's size is known."""
    characters = sum(source.characters(name) or 0 for name in source.parts)
    token_bytes = tokenizer.dtype.itemsize + (source.format.kind != "text")
    needed = characters // TOKEN_CHARACTERS * token_bytes
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has removed it
            needed -= file.stat().st_size
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
