"""What the GPU kernels compile to, without a GPU: python benchmarks/gpu/sass.py [--sizes 64 128] [--widths 768]

JAX lowers them for CUDA to Triton's IR, in bfloat16 (attention packed and with dropout); the triton package (pip
install "triton==3.9.*"), which brings NVIDIA's assembler along, compiles that for each compute capability. XLA has a
Triton of its own, of another version: what is shown here is near what a GPU will run, not the same.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.flash import flash_attention
from jaxlm.ops.flash_kernels import TILES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fused
from lib.report import markdown

SMALLEST_SHARED = 99 * 1024  # bytes that a program may have on the smallest GPUs of compute capability 8.0 and later
FEW = 64  # bytes a thread that a kernel may spill: some indices, outside of the loops
ROWS, LENGTH, HEADS, GROUPS = 2, 1024, 4, 2
PARTS = {"norm_forward_kernel": "norm", "norm_backward_kernel": "norm and product", "loss_kernel": "loss"}


class Lowered(NamedTuple):
    """One kernel, for the triton package."""

    size: int  # of heads, channels or the vocabulary
    name: str
    text: str  # Triton's IR
    warps: int
    stages: int


class Compiled(NamedTuple):
    """One kernel, as the assembler reports it."""

    size: int
    kernel: str
    warps: int
    capability: int  # 80 for 8.0
    registers: int  # a thread
    spilled: int  # bytes a thread that registers had no room for
    shared: int  # bytes of shared memory
    tensor_cores: str  # instruction for products: "wgmma" (9.0), "mma" or none


def as_h100(mesh: jax.sharding.AbstractMesh) -> jax.sharding.AbstractMesh:
    """The mesh, as one of H100s: JAX 0.11 asks for which GPU it lowers a Triton kernel, where none is."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return mesh.update(abstract_device=device)


def lowered(size: int, function: Callable[..., Any], *arguments: Any) -> Iterator[Lowered]:
    """The kernels that a function of arrays, or of their shapes, uses."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with jax.sharding.use_abstract_mesh(as_h100(jax.sharding.AbstractMesh((), ()))):
        traced = jax.jit(function).trace(*arguments)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found: list[dict[str, Any]] = []

    def visit(operation: Any) -> Any:
        attributes = operation.operation.attributes
        if "call_target_name" in attributes and "triton" in str(attributes["call_target_name"]):
            found.append({item.name: item.attr for item in attributes["mhlo.backend_config"]})
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    context = ir.Context()
    dialect.register_dialect(context)
    with context:
        for settings in found:
            name, text = str(settings["name"]).strip('"'), str(ir.Module.parse(settings["ir"].value_bytes))
            yield Lowered(size, name, text, int(settings["num_warps"]), int(settings["num_stages"]))


def of_attention(size: int) -> Iterator[Lowered]:
    """The kernels of a forward and a backward pass."""
    array = lambda heads: jax.ShapeDtypeStruct((ROWS, LENGTH, heads, size), jnp.bfloat16)  # noqa: E731
    segments = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    key = jax.ShapeDtypeStruct((ROWS, 2), jnp.uint32)

    def gradients(q: Any, k: Any, v: Any, segments: Any, key: Any) -> Any:
        loss = lambda *x: flash_attention(*x, segments, key, 0.1).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return lowered(size, gradients, array(HEADS), array(GROUPS), array(GROUPS), segments, key)


def of_fused(name: str, width: int) -> Lowered:
    """A kernel of PARTS."""
    case = fused.Fused(PARTS[name], width, 256)
    shapes = jax.eval_shape(lambda: fused.arguments(case, "bfloat16"))
    return next(kernel for kernel in lowered(width, fused.function(case, own=True), *shapes) if kernel.name == name)


def assemble(lowered: Lowered, capability: int) -> Compiled:
    """A kernel, compiled for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "kernel.ttir", Path(folder) / "kernel.ptx"
        source.write_text(lowered.text)
        options = {"num_warps": lowered.warps, "num_stages": lowered.stages}
        kernel = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
        ptx.write_text(kernel.asm["ptx"])
        assembler = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [assembler, "-v", "--gpu-name", name, ptx, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(what, said)[1]) for what in (r"Used (\d+) registers", r"(\d+) bytes spill st"))
    products = next((name for name in ("wgmma", "mma") if f"{name}." in kernel.asm["ptx"]), "none")
    shared = kernel.metadata.shared
    return Compiled(lowered.size, lowered.name, lowered.warps, capability, registers, spilled, shared, products)


def main(arguments: list[str]) -> int:
    """Prints a table; 1 if a kernel spills registers or takes more shared memory than the smallest GPUs have."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, choices=TILES, default=list(TILES), help="head sizes")
    parser.add_argument("--widths", nargs="*", type=int, default=[768, 1600, 8192], help="channels of norms")
    parser.add_argument("--vocabularies", nargs="*", type=int, default=[50304, 65536], help="tokens of the loss")
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], help="such as 80 90 (the default)")
    options = parser.parse_args(arguments)
    kernels = [kernel for size in options.sizes for kernel in of_attention(size)]
    kernels += [of_fused(name, width) for width in options.widths for name in PARTS if name != "loss_kernel"]
    kernels += [of_fused("loss_kernel", width) for width in options.vocabularies]
    found = [assemble(kernel, capability) for kernel in kernels for capability in options.capabilities]
    heads = [">size", "kernel", ">warps", ">capability", ">registers", ">spilled", ">shared", "products"]
    print(markdown(heads, [[str(x) for x in kernel] for kernel in found]))
    too_large = [kernel for kernel in found if kernel.spilled > FEW or kernel.shared > SMALLEST_SHARED]
    for kernel in too_large:
        print(f"too large: {kernel}", file=sys.stderr)
    return int(bool(too_large))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
