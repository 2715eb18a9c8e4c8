"""The options of generating text, declared once for the command line and Python; imports nothing heavy."""

import dataclasses
from typing import Any

from jaxlm.config import nearest
from jaxlm.config.option import option
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
        """The options that compiled functions depend on; the others at their defaults, so as not to compile anew."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
        return GenerationOptions(**{name: getattr(self, name) for name in names})

    def check_single_text(self, problem: str) -> None:
        """Raises UserError, with `problem` after the option's value, where a prompt gets several texts or beams."""
        for name, value in (("num_samples", self.num_samples), ("num_beams", self.num_beams)):
            if value != 1:
                raise UserError(f"--{name} ({value}) {problem}")


@dataclasses.dataclass(frozen=True)
class Ids:
    """What ids mean; hashable, as functions are compiled for it."""

    ends: tuple[int, ...]  # end a text
    missing: tuple[int, ...] = ()  # stand for no token, and are never generated


FIELDS = {field.name: field for field in dataclasses.fields(GenerationOptions)}


def make_options(**values: Any) -> GenerationOptions:
    """`GenerationOptions` of keyword arguments, checked; `stop` may be a str or a list.

    Raises:
      UserError: a name is unknown, a value is out of bounds, or two contradict each other.
    """
    unknown = next((name for name in values if name not in FIELDS), None)
    if unknown is not None:
        raise UserError(f"--{unknown}: unknown option{nearest(unknown, FIELDS)}; there are {', '.join(FIELDS)}")
    stop = values.get("stop")
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ()) if isinstance(stop, list | None) else stop
    if values.get("num_beams", 1) != 1:
        values.setdefault("temperature", 0.0)  # beam search never samples; only a temperature that is given conflicts
    options = GenerationOptions(**values)
    for name, field in FIELDS.items():
        check_field(f"--{name}", field, getattr(options, name))
    contradiction = _contradiction(options)
    if contradiction:
        raise UserError(contradiction)
    return options


def _contradiction(options: GenerationOptions) -> str | None:
    beams, samples, low, high = options.num_beams, options.num_samples, options.min_new_tokens, options.max_new_tokens
    if "" in options.stop:
        return "--stop () is empty; leave it out, or name the text to stop at"
    if low > high:
        return f"--min_new_tokens ({low}) exceeds --max_new_tokens ({high}); lower it"
    if beams == 1:
        penalty = options.length_penalty
        return f"--length_penalty ({penalty}) is for beams; set --num_beams, or leave it out" if penalty != 1 else None
    if options.temperature > 0:
        return f"--num_beams ({beams}) takes no samples; set --temperature 0 (not {options.temperature})"
    for name, is_set in (("top_k", options.top_k), ("top_p", options.top_p != 1), ("min_p", options.min_p)):
        if is_set:
            return f"--{name} is for samples, which --num_beams ({beams}) takes none of; leave it out"
    if options.stop:
        return "--stop is for samples, not for beams, which grow side by side; leave it or --num_beams out"
    return f"--num_samples ({samples}) exceeds --num_beams ({beams}); lower it" if samples > beams else None
