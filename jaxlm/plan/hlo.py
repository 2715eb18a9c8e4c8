"""The optimized program of a compiled update, read from its text: `jit(f).lower(...).compile().as_text()`.

Only what HLO text has in all versions is read: `%name = shape opcode(%operand, ...), attributes`, the computations that
an instruction calls, and the table of source lines at the top. How attributes such as `replica_groups` are written
differs between versions of XLA.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
ITEM_BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_TABLES = {
    "FileNames": re.compile(r'(\d+) "(.*)"'),
    "FunctionNames": re.compile(r'(\d+) "(.*)"'),
    "FileLocations": re.compile(r"(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"),
    "StackFrames": re.compile(r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"),
}

Frame = tuple[str, str, int]  # file, function, line


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    inside: str  # its parentheses
    operands: list[str]
    calls: list[str]
    trips: int  # how often a loop's body runs
    attributes: str

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(type, dimensions) of each array in its shape."""
        return [(kind, _dimensions(dims)) for kind, dims in _ARRAY.findall(self.shape) if kind in ITEM_BYTES]

    @property
    def elements(self) -> int:
        return sum(math.prod(dims) for _, dims in self.arrays)

    @property
    def bytes(self) -> int:
        return sum(ITEM_BYTES[kind] * math.prod(dims) for kind, dims in self.arrays)

    @property
    def collective(self) -> str | None:
        """Which of COLLECTIVES it starts."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass
class Program:
    computations: dict[str, Computation]
    entry: str
    frames: dict[int, list[Frame]]  # the call stack that an instruction's stack_frame_id stands for, innermost first

    def run(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, where it stands, how often it runs) in the order of the schedule; fusions are one each."""
        computation = self.computations[name or self.entry]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                for inner in instruction.calls:
                    yield from self.run(inner, times * instruction.trips)

    def stack(self, instruction: Instruction) -> list[Frame]:
        """Where in the source it comes from, innermost call first; empty if XLA made it up."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self.frames.get(int(found[1]), []) if found else []


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d)


def parse(text: str) -> Program:
    """A module's text, taken apart.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, tuple[str, ...]]] = {name: {} for name in _TABLES}
    entry, current, table = "", None, ""
    for line in text.splitlines():
        if line in _TABLES:
            table = line
        elif table and (row := _TABLES[table].match(line)):
            tables[table][int(row[1])] = row.groups()[1:]
        elif not line.startswith(" "):
            if head := _COMPUTATION.match(line):
                current, table = computations.setdefault(head[2], Computation()), ""
                entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, shape, opcode, inside, attributes = found.groups()
            trips = _TRIPS.search(attributes)
            calls, operands = _CALLED.findall(attributes), re.findall(r"%([\w.-]+)", inside)
            times = int(trips[1]) if trips else 1
            opcode = "fusion" if opcode == "fusion-start" else opcode  # one beside others, as JAX 0.11 has some
            current.instructions[name] = Instruction(name, opcode, shape, inside, operands, calls, times, attributes)
            current.root = name if root else current.root
    if not entry:
        raise ValueError("the text of the program has no entry computation")
    return Program(computations, entry, _stacks(tables))


def _stacks(tables: dict[str, dict[int, tuple[str, ...]]]) -> dict[int, list[Frame]]:
    files, functions, locations = tables["FileNames"], tables["FunctionNames"], tables["FileLocations"]
    stacks: dict[int, list[Frame]] = {0: []}
    for frame, (location, parent) in tables["StackFrames"].items():  # callers come first
        file, function, line = locations[int(location)]
        outer = stacks[int(parent or 1) - 1]  # XLA writes the caller's id plus one, so that 1 is nobody
        stacks[frame] = [(files[int(file)][0], functions[int(function)][0], int(line)), *outer]
    return stacks


def collective_bytes(instruction: Instruction, computation: Computation) -> int:
    """Bytes of the arrays before scattering or after gathering, whichever is more."""
    taken = sum(computation.instructions[name].bytes for name in instruction.operands)
    given = instruction.bytes
    if instruction.opcode.endswith("-start"):  # the shape has the operands in it, unless it is an all-reduce's
        given -= taken
    return max(taken, given)


def bytes_moved(program: Program, at_least: int = 0) -> Counter[str]:
    """{collective: bytes} of one run of the program, loops counted as often as they run.

    An all-reduce counts twice, as it is a reduce-scatter and an all-gather. Collectives of fewer than `at_least` bytes
    are left out: those of the loss, the norm and other single numbers.
    """
    total: Counter[str] = Counter()
    for instruction, computation, times in program.run():
        kind = instruction.collective
        if kind is not None and (size := collective_bytes(instruction, computation)) >= at_least:
            total[kind] += size * times * (2 if kind == "all-reduce" else 1)
    return total
