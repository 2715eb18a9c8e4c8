"""Sizes in bytes, as people write them."""

import re

from jaxlm.errors import UserError


def parse_size(option: str, text: str, low: int = 1, high: int = 2**50) -> int:
    """Bytes in "80GB" or "80G" (10^9), "79.6GiB" (2^30), "500MB" and so on from K to T, in any case.

    Raises:
      UserError: it is none of these, or not from `low` to `high`; names `option`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(B|IB)?", text.strip().upper())
    if match is None:
        raise UserError(f"{option} ({text}) must be a number with a unit from K to T, such as 500MB, 80GB or 79.6GiB")
    size = float(match[1]) * (1024 if match[3] == "IB" else 1000) ** (" KMGT".index(match[2]))
    if not low <= size <= high:
        raise UserError(f"{option} ({text}) must be from {_show_size(low)} to {_show_size(high)}")
    return int(size)


def _show_size(size: int) -> str:
    """`size` in the largest binary unit that divides it, such as 4GiB."""
    power = max(power for power in range(5) if size % 1024**power == 0)
    return f"{size // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
