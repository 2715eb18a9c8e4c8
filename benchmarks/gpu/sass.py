"""What the fused attention kernels compile to, without a GPU: python benchmarks/gpu/sass.py [--sizes 64 128]

JAX lowers them for CUDA to Triton's IR, packed and with dropout, in bfloat16; the triton package (pip install
"triton==3.9.*"), which brings NVIDIA's assembler along, compiles that for each compute capability. XLA has a Triton of
its own, of another version: what is shown here is near what a GPU will run, not the same.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.flash import flash_attention
from jaxlm.ops.flash_kernels import TILES, Tile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.report import markdown

SMALLEST_SHARED = 99 * 1024  # bytes that a program may have on the smallest GPUs of compute capability 8.0 and later
FEW = 64  # bytes a thread that a kernel may spill: some indices, outside of the loops
ROWS, LENGTH, HEADS, GROUPS = 2, 1024, 4, 2


class Compiled(NamedTuple):
    """One kernel, as the assembler reports it."""

    head_size: int
    kernel: str
    tile: Tile
    capability: int  # 80 for 8.0
    registers: int  # a thread
    spilled: int  # bytes a thread that registers had no room for
    shared: int  # bytes of shared memory
    tensor_cores: str  # instruction for products: "wgmma" (9.0), "mma" or none


def as_h100(mesh: jax.sharding.AbstractMesh) -> jax.sharding.AbstractMesh:
    """The mesh, as one of H100s: JAX 0.11 asks for which GPU it lowers a Triton kernel, where none is."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return mesh.update(abstract_device=device)


def triton_ir(size: int) -> Iterator[tuple[str, str]]:
    """(name, Triton's IR as text) of the kernels of a forward and a backward pass."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    array = lambda heads: jax.ShapeDtypeStruct((ROWS, LENGTH, heads, size), jnp.bfloat16)  # noqa: E731
    segments = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    key = jax.ShapeDtypeStruct((ROWS, 2), jnp.uint32)

    def gradients(q: Any, k: Any, v: Any, segments: Any, key: Any) -> Any:
        loss = lambda *x: flash_attention(*x, segments, key, 0.1).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    with jax.sharding.use_abstract_mesh(as_h100(jax.sharding.AbstractMesh((), ()))):
        traced = jax.jit(gradients).trace(array(HEADS), array(GROUPS), array(GROUPS), segments, key)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found: list[tuple[str, bytes]] = []

    def visit(operation: Any) -> Any:
        attributes = operation.operation.attributes
        if "call_target_name" in attributes and "triton" in str(attributes["call_target_name"]):
            settings = {item.name: item.attr for item in attributes["mhlo.backend_config"]}
            found.append((str(settings["name"]).strip('"'), settings["ir"].value_bytes))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    context = ir.Context()
    dialect.register_dialect(context)
    with context:
        yield from ((name, str(ir.Module.parse(bytecode))) for name, bytecode in found)


def assemble(text: str, capability: int, tile: Tile) -> tuple[int, int, int, str]:
    """(registers, bytes spilled, bytes of shared memory, instruction for products) of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "kernel.ttir", Path(folder) / "kernel.ptx"
        source.write_text(text)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        kernel = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
        ptx.write_text(kernel.asm["ptx"])
        assembler = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [assembler, "-v", "--gpu-name", name, ptx, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(what, said)[1]) for what in (r"Used (\d+) registers", r"(\d+) bytes spill st"))
    products = next((name for name in ("wgmma", "mma") if f"{name}." in kernel.asm["ptx"]), "none")
    return registers, spilled, kernel.metadata.shared, products


def compiled(size: int, capabilities: list[int]) -> Iterator[Compiled]:
    """The three kernels of a head size, for each compute capability."""
    tiles = TILES[size]
    of = {"forward_kernel": tiles.forward, "keys_kernel": tiles.keys_and_values, "queries_kernel": tiles.queries}
    for name, text in triton_ir(size):
        for capability in capabilities:
            yield Compiled(size, name, of[name], capability, *assemble(text, capability, of[name]))


def main(arguments: list[str]) -> int:
    """Prints a table; 1 if a kernel spills registers or takes more shared memory than the smallest GPUs have."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, choices=TILES, default=list(TILES), help="head sizes")
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], help="such as 80 90 (the default)")
    options = parser.parse_args(arguments)
    found = [kernel for size in options.sizes for kernel in compiled(size, options.capabilities)]
    heads = [">head size", "kernel", "tile", ">capability", ">registers", ">spilled", ">shared", "products"]
    rows = [[str(x) if not isinstance(x, Tile) else " x ".join(map(str, x[:2])) for x in kernel] for kernel in found]
    print(markdown(heads, rows))
    too_large = [kernel for kernel in found if kernel.spilled > FEW or kernel.shared > SMALLEST_SHARED]
    for kernel in too_large:
        print(f"too large: {kernel}", file=sys.stderr)
    return int(bool(too_large))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
