"""The options of generating text, declared once for the command line and Python; imports nothing heavy."""

import argparse
import dataclasses
import json
import typing
from typing import Any

from jaxlm.commands import cli
from jaxlm.config import nearest, type_name
from jaxlm.config.schema import option
from jaxlm.config.validate import check_field
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How texts are made. Frozen and hashable: functions are compiled for one of these."""

    max_new_tokens: int = option(128, "longest continuation, in tokens", low=1)
    min_new_tokens: int = option(0, "tokens before which a text does not end with <eos>", low=0)
    temperature: float = option(0.8, "divides the logits; 0 takes the likeliest token (greedy)", low=0)
    top_k: int = option(0, "sample among the K likeliest tokens; 0: all", low=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this joint probability", above=0, high=1)
    min_p: float = option(0.0, "sample among tokens at least this fraction as likely as the likeliest", low=0, high=1)
    repetition_penalty: float = option(
        1.0, "divides the positive logits of tokens that are there already, multiplies the negative ones", above=0
    )
    num_samples: int = option(1, "texts for each prompt (with num_beams: its best ones)", low=1)
    num_beams: int = option(1, "beam search with this many beams; 1: none (needs temperature 0)", low=1)
    length_penalty: float = option(1.0, "beams: scores are log-probabilities / length to the power of this")
    stop: tuple[str, ...] = option((), "text that ends a continuation and is left out of it; may be repeated")
    seed: int = option(0, "equal seeds give equal samples", low=0)
    batch_size: int = option(
        16, "texts made at once (beams: those of one prompt); changes speed and memory, no text", low=1
    )

    def compiled(self) -> "GenerationOptions":
        """The part that compiled functions depend on; all else is at its default, so that it asks for no new ones."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
        return GenerationOptions(**{name: getattr(self, name) for name in names})


NAMES = tuple(field.name for field in dataclasses.fields(GenerationOptions))


def make_options(**values: Any) -> GenerationOptions:
    """`GenerationOptions` of keyword arguments, checked; a str or a list will do for `stop`.

    Raises:
      UserError: a name is unknown, a value is out of bounds, or two contradict each other.
    """
    unknown = next((name for name in values if name not in NAMES), None)
    if unknown is not None:
        raise UserError(f"--{unknown}: unknown option{nearest(unknown, NAMES)}; there are {', '.join(NAMES)}")
    stop = values.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "temperature" not in values and values.get("num_beams", 1) != 1:
        values["temperature"] = 0.0  # what beam search means: only a temperature that was asked for contradicts it
    options = GenerationOptions(**values)
    hints = typing.get_type_hints(GenerationOptions)
    for field in dataclasses.fields(GenerationOptions):
        check_field(f"--{field.name}", field, hints[field.name], getattr(options, field.name))
    _check_together(options)
    return options


def _check_together(options: GenerationOptions) -> None:
    if "" in options.stop:
        raise UserError("--stop () is empty; leave it out, or name the text to stop at")
    if options.min_new_tokens > options.max_new_tokens:
        raise UserError(
            f"--min_new_tokens ({options.min_new_tokens}) exceeds --max_new_tokens ({options.max_new_tokens}); lower it"
        )
    if options.num_beams == 1:
        if options.length_penalty != 1:
            raise UserError(
                f"--length_penalty ({options.length_penalty}) is for beams; set --num_beams, or leave it out"
            )
        return
    if options.temperature > 0:
        raise UserError(
            f"--num_beams ({options.num_beams}) takes no samples; set --temperature 0 (not {options.temperature})"
        )
    filters = {"top_k": options.top_k != 0, "top_p": options.top_p != 1, "min_p": options.min_p != 0}
    if any(filters.values()):
        name = next(name for name, is_set in filters.items() if is_set)
        raise UserError(f"--{name} is for samples, which --num_beams ({options.num_beams}) takes none of; leave it out")
    if options.stop:
        raise UserError("--stop ends texts as they are written, which beams are not; leave it or --num_beams out")
    if options.num_samples > options.num_beams:
        raise UserError(f"--num_samples ({options.num_samples}) exceeds --num_beams ({options.num_beams}); lower it")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --NAME VALUE for every option; those that are not given are left out of what is parsed."""
    hints = typing.get_type_hints(GenerationOptions)
    for field in dataclasses.fields(GenerationOptions):
        repeated = field.name == "stop"
        kind = "text" if repeated else type_name(hints[field.name])
        default = "none" if repeated else json.dumps(field.default)
        parser.add_argument(
            f"--{field.name}",
            action="append" if repeated else "store",
            metavar="TEXT" if repeated else "VALUE",
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} ({kind}; default: {default})",
        )


def options_from(arguments: argparse.Namespace) -> GenerationOptions:
    """The options of `add_options` that were given, converted and checked. Raises UserError."""
    hints = typing.get_type_hints(GenerationOptions)
    given = {name: value for name, value in vars(arguments).items() if name in NAMES}
    return make_options(
        **{
            name: value if name == "stop" else cli.convert(f"--{name}", value, hints[name])
            for name, value in given.items()
        }
    )
