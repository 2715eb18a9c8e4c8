"""What data.sources says: texts with names, and how many of the rows are each one's."""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from jaxlm.config.fields import check_choice, shown
from jaxlm.config.schema import DataConfig
from jaxlm.errors import UserError

LONGEST_PERIOD = 100_000  # rows after which the order of sources repeats: weights of five digits


class MixtureOptions(NamedTuple):
    """data.sources and data.anneal_weights, read.

    files: {source: what names its files}.
    weights: the rows of each source in a period, as whole numbers; a second list where weights change on the way.
    """

    files: dict[str, tuple[str, ...]]
    weights: list[list[int]]


def mixture_options(data: DataConfig) -> MixtureOptions:
    """Raises UserError if data.sources or data.anneal_weights is not of its form."""
    files, first = dict[str, tuple[str, ...]](), dict[str, Fraction]()
    for item in data.sources:
        found = re.fullmatch(r"([\w.]+)=(.+):(\d{0,20}\.?\d{1,20})", item, re.DOTALL)
        if found is None or "" in (patterns := found[2].split("|")):
            raise UserError(f"data.sources ({item}) must be NAME=FILES:WEIGHT, such as web=web/*.jsonl:0.7")
        if found[1] in files:
            raise UserError(f"data.sources ({item}): there are two sources of that name; join their files with |")
        files[found[1]], first[found[1]] = tuple(patterns), Fraction(found[3])
    then = dict[str, Fraction]()
    for item in data.anneal_weights:
        found = re.fullmatch(r"([\w.]+)=(\d{0,20}\.?\d{1,20})", item)
        if found is None or found[1] in then:
            raise UserError(f"data.anneal_weights ({item}) must be NAME=WEIGHT, once for a source, such as web=0.3")
        check_choice("data.anneal_weights", found[1], files)
        then[found[1]] = Fraction(found[2])
    for name in files:
        if not first[name] and not then.get(name):
            raise UserError(
                f"data.sources ({name}): its weight is 0, so no row is trained on; raise it, or leave it out"
            )
    weights = [_whole("data.sources", data.sources, [*first.values()])] if files else []
    if then:
        after = [then.get(name, Fraction(0)) for name in files]
        weights.append(_whole("data.anneal_weights", data.anneal_weights, after))
    return MixtureOptions(files, weights)


def _whole(option: str, value: tuple[str, ...], weights: list[Fraction]) -> list[int]:
    """Whole numbers in the same proportions, as small as they can be."""
    if not any(weights):
        raise UserError(f"{option} ({shown(value)}): all weights are 0; raise one")
    scaled = [int(weight * math.lcm(*(weight.denominator for weight in weights))) for weight in weights]
    whole = [weight // math.gcd(*scaled) for weight in scaled]
    if sum(whole) > LONGEST_PERIOD:
        raise UserError(
            f"{option} ({shown(value)}): no {LONGEST_PERIOD:,} rows or fewer have these shares exactly; "
            "write the weights with fewer digits"
        )
    return whole
