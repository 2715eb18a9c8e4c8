"""Shows what a model will see: the first packed rows of a run, decoded, with the borders of their documents.

Where not all is learned, [[ and ]] stand around what is, and special tokens are shown.

Nothing is trained; text, tokenizer and rows are prepared as the run would, and kept in its caches.
"""

import argparse
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from
from jaxlm.data.files import check_names
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.data.loader import Rows
    from jaxlm.data.tokenizer import Tokenizer


def add_options(parser: Parser) -> None:
    add_config_file(parser)
    text = "devices of the run (default: the fewest that its options ask for)"
    parser.add_argument("--devices", type=int, metavar="N", help=text)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="rows of the run before them (default: 0)")
    text = "characters of a piece's text to show; the rest of a longer one is counted (default: 400)"
    parser.add_argument("--characters", type=int, default=400, metavar="N", help=text)
    add_config_options(parser)


def run(arguments: argparse.Namespace) -> None:
    for name, low in (("devices", 1), ("rows", 1), ("first", 0), ("characters", 1)):
        if (value := vars(arguments)[name]) is not None and value < low:
            raise UserError(f"--{name} ({value}) must be at least {low}")
    config = config_from(arguments)
    check_names(config.data)

    from jaxlm.interop.pretrained import open_pretrained
    from jaxlm.parallel.processes import say
    from jaxlm.run.setup import resolve
    from jaxlm.run.text import prepare_text

    training = config.training
    fewest = training.world_size or training.zero_group_size or training.tensor_parallel
    devices = arguments.devices or fewest
    resolved = resolve(config, devices)
    config = resolved.config
    pretrained = open_pretrained(config)
    text = prepare_text(config, None if pretrained is None else pretrained.tokenizer)
    order = text.rows.order(config.training.seed, resolved.anneal_row)
    if resolved.anneal_row is not None:
        say(
            f"data.anneal_weights hold from row {resolved.anneal_row:,} on, of a run on {devices} device(s) (--devices)"
        )
    for place in range(arguments.first, arguments.first + arguments.rows):
        source, rows, row = text.rows.find(order[place])
        which = f"row {place:,} of the run" + f", of {source}" * bool(source)
        print("\n".join(describe_row(rows, row, text.tokenizer, which, arguments.characters)))


def _decoded(rows: "Rows", start: int, end: int, tokenizer: "Tokenizer") -> str:
    """The text of a piece's tokens; where not all are learned, with the special ones, and [[ and ]] around what is."""
    if (is_learned := rows.learned) is None:
        return tokenizer.decode(rows.tokens[start:end])
    runs = [(learned, [*places]) for learned, places in groupby(range(start, end), lambda place: is_learned[place])]
    texts = [(learned, tokenizer.decode(rows.tokens[places], special=True)) for learned, places in runs]
    return "".join(f"[[{text}]]" if learned else text for learned, text in texts)


def describe_row(rows: "Rows", index: int, tokenizer: "Tokenizer", which: str, characters: int) -> Iterator[str]:
    """The lines about row `index`, the first of which begins with `which`; texts are cut to `characters`."""
    plan, borders = rows.plan, rows.document_offsets
    pieces = range(plan.row_offsets[index], plan.row_offsets[index + 1])
    pairs = int(plan.piece_length[pieces.start : pieces.stop].sum())
    of_which = "" if rows.learned is None else f" ({int(rows[index]['loss_mask'].sum())} learned)"
    yield (
        f"{which}: {pairs} targets{of_which} in {plan.max_length} places, {len(pieces)} piece{'s' * (len(pieces) != 1)}"
    )
    for piece in pieces:
        start, end = int(plan.piece_start[piece]), int(plan.piece_start[piece] + plan.piece_length[piece]) + 1
        document = int(borders.searchsorted(start, side="right")) - 1
        low, high = int(borders[document]), int(borders[document + 1])
        part = "all" if (start, end) == (low, high) else f"tokens {start - low:,} to {end - low - 1:,}"
        yield f"  document {document:,}, {part} of its {high - low:,} tokens:"
        text = _decoded(rows, start, end, tokenizer)
        begins, ends = (f"<{name}>" * there for name, there in (("begins", start == low), ("ends", end == high)))
        shown = text[:characters] + f" ... {len(text) - characters:,} characters more" * (len(text) > characters)
        yield from ("    " + line for line in f"{begins}{shown}{ends}".splitlines())
