"""Bytes of the collectives in a compiled program, from its text: `jit(f).lower(...).compile().as_text()`.

Only what HLO text has in all versions is read: `%name = shape opcode(%operand, ...), attributes`, and the computations
that an instruction calls. How attributes such as `replica_groups` are written differs between versions of XLA.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "f64": 8, "s64": 8}
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\(([^)]*)\)")
CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    opcode: str
    shape: str
    operands: list[str]
    calls: list[str]
    trips: int  # how often a loop's body runs


Computation = dict[str, Instruction]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as "(f32[8,16]{1,0}, bf16[4])"."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(ITEM_BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in arrays)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module by name, and the name of the one that the program starts with."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            name, shape, opcode, operands = found.groups()
            trips = TRIPS.search(line)
            current[name] = Instruction(
                opcode,
                shape,
                re.findall(r"%([\w.-]+)", operands),
                CALLED.findall(line),
                int(trips[1]) if trips else 1,
            )
    if not entry:
        raise ValueError("the text of the program has no entry computation")
    return computations, entry


def collective_bytes(instruction: Instruction, computation: Computation) -> int:
    """Bytes of the arrays before scattering or after gathering, whichever is more."""
    taken = sum(shape_bytes(computation[name].shape) for name in instruction.operands)
    given = shape_bytes(instruction.shape)
    if instruction.opcode.endswith("-start"):  # the shape has the operands in it, unless it is an all-reduce's
        given -= taken
    return max(taken, given)


def bytes_moved(text: str, at_least: int = 0) -> Counter[str]:
    """{collective: bytes} of one run of the program, loops counted as often as they run.

    An all-reduce counts twice, as it is a reduce-scatter and an all-gather. Collectives of fewer than `at_least` bytes
    are left out: those of the loss, the norm and other single numbers.
    """
    computations, entry = parse(text)

    def count(name: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and (size := collective_bytes(instruction, computations[name])) >= at_least:
                total[kind] += size * (2 if kind == "all-reduce" else 1)
            for inner in instruction.calls:
                for kind, size in count(inner).items():
                    total[kind] += size * instruction.trips
        return total

    return count(entry)
