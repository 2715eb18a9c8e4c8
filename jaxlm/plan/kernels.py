"""What each kernel of an optimized GPU program reads, writes and multiplies, and which part of the model it is.

Bytes are those that the hardware moves: a slice that a fusion reads of a larger array counts as the slice, an array
that is updated in place as what is written, a loop's body as often as it runs, and our own kernels as what their grid
loads. Caches are left out.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from jaxlm.ops.flash_kernels import HOPPER_TILES, TILES, Tile
from jaxlm.ops.norm_kernels import BACKWARD, FORWARD
from jaxlm.plan.hlo import ITEM_BYTES, Computation, Frame, Instruction, Program

PARTS = ("products", "attention", "loss", "norms", "activations", "embeddings", "optimizer", "other")
_NO_KERNELS = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "copy-done"),
}
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
_SLICES = ("slice", "dynamic-slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_OWN = re.compile(r"\b(forward|keys|queries)_kernel")  # of ops/flash_kernels.py and hopper_kernels.py
_OWN_NORM = re.compile(r"\bnorm_(forward|backward)_kernel")  # of ops/norm_kernels.py
_OWN_PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}  # of each block of queries and block of keys
_OURS = re.compile(r"(?:^|/)jaxlm/((?:[a-z_]+/)?[a-z_]+\.py)$")


@dataclass(frozen=True)
class Kernel:
    name: str
    part: str  # one of PARTS
    bytes: int  # read and written
    flops_16: int  # of matrix products of 16-bit factors
    flops_32: int  # of float32 factors, which GPUs multiply as TF32 at half the speed
    source: str  # "file:line function" of the line of the model that it comes from
    attention: str | None = None  # one of targets.ATTENTION_EFFICIENCY: an attention kernel, ours or cuDNN's

    @property
    def flops(self) -> int:
        return self.flops_16 + self.flops_32


def kernel_of(instruction: Instruction, computation: Computation, program: Program) -> Kernel | None:
    """The kernel that an instruction of the schedule is; None if it is none, such as a loop or a collective."""
    opcode = instruction.opcode
    if (
        opcode in _NO_KERNELS
        or instruction.collective
        or opcode.endswith("-done")
        or _ALLOCATES in instruction.attributes
    ):
        return None
    if opcode == "fusion" and (called := _call_in(program.computations[instruction.calls[0]])) is not None:
        kernel = kernel_of(called, program.computations[instruction.calls[0]], program)
        return kernel and replace(kernel, name=instruction.name)
    stack = program.stack(instruction)
    if opcode == "custom-call" and (own := _OWN.search(instruction.attributes)):
        flops, moved = _own_kernel(own[1], instruction, computation)
        kind = "forward" if own[1] == "forward" else "backward"
        return Kernel(instruction.name, "attention", moved, flops, 0, source_of(stack), kind)
    moved = _moved(instruction, computation, program)
    if opcode == "custom-call" and (own := _OWN_NORM.search(instruction.attributes)):
        moved += _loaded_again(FORWARD if own[1] == "forward" else BACKWARD, instruction, computation)
        return Kernel(instruction.name, "norms", moved, 0, 0, source_of(stack))
    if cudnn := re.search(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"', instruction.attributes):
        rows, length, heads, size = computation.instructions[instruction.operands[0]].arrays[0][1]
        flops = rows * heads * length * length * size * (5 if cudnn[1] else 2)  # products, of half of the pairs each
        kind = "cudnn backward" if cudnn[1] else "cudnn forward"
        return Kernel(instruction.name, "attention", moved, flops, 0, source_of(stack), kind)
    whole, half = _products(instruction, computation, program)
    return Kernel(instruction.name, part_of(stack, whole + half), moved, half, whole, source_of(stack))


def _call_in(fused: Computation) -> Instruction | None:
    """The kernel of a library, or of ours, that reads slices where they stand: XLA shows it as a fusion with them."""
    return next((x for x in fused.instructions.values() if x.opcode == "custom-call"), None)


def part_of(stack: list[Frame], flops: int) -> str:
    """The part of the model that a kernel belongs to, by where in the source its root operation stands."""
    files = {Path(file).name for file, _, _ in stack}
    functions = " ".join(function for _, function, _ in stack)
    if "loss.py" in files:
        return "loss"
    if files & {"flash.py", "flash_kernels.py", "hopper.py", "blockwise.py", "attention_kernels.py"}:
        return "attention"
    if "optim.py" in files or any("optax" in file for file, _, _ in stack):
        return "optimizer"
    if flops:
        return "products"
    if next(_ours(stack), ("", "", 0))[1].startswith("make_train_step"):
        return "optimizer"  # whose last operation is the choice between the old state and the new
    for part, pattern in (("activations", r"Mlp\."), ("norms", r"Norm\.|per_token|_norm"), ("embeddings", "embed")):
        if re.search(pattern, functions):
            return part
    return "other"


def source_of(stack: list[Frame]) -> str:
    """The innermost line of our own: "model/layers.py:41 Mlp.__call__"."""
    file, function, line = next(_ours(stack), ("", "", 0))
    return f"{file}:{line} {function.split('.<locals>')[0]}" if file else ""


def _ours(stack: list[Frame]) -> Iterator[Frame]:
    for file, function, line in stack:
        if found := _OURS.search(file):
            yield found[1], function, line


def _moved(instruction: Instruction, computation: Computation, program: Program) -> int:
    inputs = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode != "fusion":
        if instruction.opcode in _SLICES:
            return 2 * instruction.bytes
        return sum(x.bytes for x in inputs) + instruction.bytes
    fused = program.computations[instruction.calls[0]]
    read = _read_of_parameters(fused)
    return sum(min(read.get(i, 0), x.bytes) for i, x in enumerate(inputs)) + _written(fused)


def _read_of_parameters(fused: Computation) -> dict[int, int]:
    """{parameter of a fusion: bytes that are read of it}, from what each instruction needs of its operands."""
    known = fused.instructions
    needed: dict[str, int] = {fused.root: known[fused.root].elements}
    read: dict[int, int] = {}
    for x in reversed(known.values()):
        wanted = needed.get(x.name, 0)
        if x.opcode == "parameter":
            items = [ITEM_BYTES[kind] for kind, _ in x.arrays]
            read[int(x.inside)] = wanted * max(items, default=0)
        for position, name in enumerate(x.operands if wanted else ()):
            operand = known[name]
            needed[name] = min(operand.elements, needed.get(name, 0) + _wanted_of(x, position, operand, wanted, fused))
    return read


def _wanted_of(x: Instruction, position: int, operand: Instruction, wanted: int, fused: Computation) -> int:
    """Elements of an operand that it takes to make `wanted` elements of `x`."""
    if x.opcode == "tuple":
        return operand.elements
    if x.opcode in _SLICES and position == 0:
        return wanted
    if x.opcode in _IN_PLACE:
        update = _update_of(x, fused).elements
        if position > 0:
            return operand.elements
        return update if x.opcode == "scatter" else 0 if _is_result(x, fused) else max(0, wanted - update)
    return math.ceil(operand.elements * wanted / max(1, x.elements))


def _results(fused: Computation) -> list[Instruction]:
    """The arrays that a fusion writes, seen through changes of their shape alone."""
    root = fused.instructions[fused.root]
    found = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for i, x in enumerate(found):
        while x.opcode == "bitcast":
            x = fused.instructions[x.operands[0]]
        found[i] = x
    return found


def _is_result(x: Instruction, fused: Computation) -> bool:
    return any(x is result for result in _results(fused))


def _written(fused: Computation) -> int:
    return sum((_update_of(x, fused) if x.opcode in _IN_PLACE else x).bytes for x in _results(fused))


def _update_of(x: Instruction, fused: Computation) -> Instruction:
    """What an operation of `_IN_PLACE` writes."""
    return fused.instructions[x.operands[-1 if x.opcode == "scatter" else 1]]


def _products(instruction: Instruction, computation: Computation, program: Program) -> tuple[int, int]:
    """FLOPs of the matrix products in a kernel, of float32 and of 16-bit factors."""
    whole = half = 0
    if instruction.opcode == "fusion":
        fused = program.computations[instruction.calls[0]]
        for x in fused.instructions.values():
            if x.opcode in ("dot", "fusion"):
                more = _products(x, fused, program)
                whole, half = whole + more[0], half + more[1]
    elif instruction.opcode == "dot" or "__cublas" in instruction.attributes:
        kind, left = computation.instructions[instruction.operands[0]].arrays[0]
        contracted = math.prod(left[d] for d in _numbers("lhs_contracting_dim", instruction))
        flops = 2 * math.prod(instruction.arrays[0][1]) * contracted
        whole, half = (flops, 0) if ITEM_BYTES[kind] >= 4 else (0, flops)
    return whole, half


def _numbers(name: str, instruction: Instruction) -> list[int]:
    """Of name={1,2}, or of a cuBLAS call's "name":["1","2"]."""
    found = re.search(name + r'\w*"?[=:][\[{]([\d,"]*)', instruction.attributes)
    return [int(d) for d in re.findall(r"\d+", found[1])] if found else []


def _loaded_again(vectors: int, instruction: Instruction, computation: Computation) -> int:
    """Bytes of a norm's parameters that the programs of a kernel load, each of them those of all, but for the first."""
    arrays = [computation.instructions[x].arrays[0] for x in instruction.operands]
    n, d = next(dims for _, dims in arrays if len(dims) == 2)
    programs = math.ceil(n / vectors)
    return (programs - 1) * sum(d * ITEM_BYTES[kind] for kind, dims in arrays if dims == (d,) and d != n)


def _own_kernel(name: str, instruction: Instruction, computation: Computation) -> tuple[int, int]:
    """(FLOPs, bytes) of one of our attention kernels; of packed rows as if each were one document.

    Each program loads its own block, and for each block of the other side that it sees one block of two arrays.
    """
    written = {int(i) for i in re.findall(r"\}: \((\d+), \{", instruction.attributes)}  # operands that become outputs
    read = [name for i, name in enumerate(instruction.operands) if i not in written]
    arrays = [computation.instructions[x].arrays[0] for x in read]
    heads = [(kind, dims) for kind, dims in arrays if len(dims) >= 4]  # q (and its gradient), k, v, or all in one
    (kind, (rows, length, *_, queries, size)), groups = heads[0], min(dims[-2] for _, dims in heads)
    tiles = HOPPER_TILES if 'custom_call_target="mosaic_gpu' in instruction.attributes else TILES[size]
    tile: Tile = {"forward": tiles.forward, "keys": tiles.keys_and_values, "queries": tiles.queries}[name]
    m, n = tile.queries, tile.keys
    visible = sum(math.ceil((i + 1) * m / n) for i in range(length // m))  # pairs of blocks, of one head
    flops = rows * queries * visible * m * n * size * 2 * _OWN_PRODUCTS[name]
    loaded = rows * queries * visible * 2 * (m if name == "keys" else n) * size * ITEM_BYTES[kind]
    joint = len(heads[0][1]) == 5
    blocks = 2 if name == "keys" else len(heads) - (0 if joint else 2)  # arrays of which a program reads its own
    own = blocks * rows * length * (groups if name == "keys" else queries) * size * ITEM_BYTES[kind]
    return flops, loaded + own + sum(_own_output(name, *array) for array in instruction.arrays)


def _own_output(name: str, kind: str, dims: tuple[int, ...]) -> int:
    """Bytes that one of our attention kernels writes of an output; of the gradients of all parts those of its own."""
    share = Fraction(2 if name == "keys" else 1, 3) if len(dims) == 5 and dims[2] == 3 else 1
    return int(math.prod(dims) * ITEM_BYTES[kind] * share)
