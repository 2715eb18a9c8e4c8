"""Sizes in bytes, as people write them."""

import re

from jaxlm.errors import UserError

UNITS = {
    unit + suffix: size
    for unit, power in zip("KMGT", range(1, 5), strict=True)
    for suffix, size in (("", 1000**power), ("B", 1000**power), ("IB", 1024**power))
}


def parse_size(option: str, text: str, low: int = 1, high: int = 2**50) -> int:
    """Bytes in "80GB" or "80G" (10^9), "79.6GiB" (2^30), "500MB" and so on from K to T, in any case.

    Raises:
      UserError: it is none of these, or not from `low` to `high`; names `option`.
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text.strip().upper())
    if match is None:
        raise UserError(f"{option} ({text}) must be a number with a unit from K to T, such as 500MB, 80GB or 79.6GiB")
    size = float(match[1]) * UNITS[match[2]]
    if not low <= size <= high:
        raise UserError(f"{option} ({text}) must be from {show_size(low)} to {show_size(high)}")
    return int(size)


def show_size(size: int) -> str:
    """`size` in the largest binary unit that divides it, such as 4GiB."""
    power = next((power for power in (4, 3, 2, 1) if size % 1024**power == 0 and size), 0)
    return f"{size // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
