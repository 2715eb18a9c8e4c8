"""The kernels of jaxlm/ops/hopper.py, really compiled: needs the extra "plan" and JAX 0.11.

pytest -o addopts= tests/compiled
"""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlm.config import load_config, replace_fields
from jaxlm.errors import UserError
from jaxlm.plan.plan import plan
from jaxlm.plan.targets import plugin, topology

try:
    plugin()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)
if jax.__version_info__ < (0, 11):
    pytest.skip("JAX 0.10 has another dialect of Mosaic", allow_module_level=True)

os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "10"  # JAX's default again: a plan looks at the lines of the model
jax.config.update("jax_traceback_in_locations_limit", 10)


@pytest.mark.parametrize(
    ("size", "groups", "packed", "rate", "spilled"),
    [
        (64, 4, True, 0.1, (0, 0)),
        (64, 4, False, 0.0, (0, 0)),
        (64, None, True, 0.1, (0, 0)),
        (128, 2, True, 0.1, (0, 192)),
        (128, 4, True, 0.0, (0, 64)),
        (128, None, True, 0.1, (64, 192)),
    ],
)
def test_registers_suffice(
    size: int,
    groups: int | None,
    packed: bool,
    rate: float,
    spilled: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """NVIDIA's assembler spills at most so many bytes a thread, forward and in the keys' kernel.

    `groups`: heads of keys; None: all in one product, with biases.
    """
    from jaxlm.ops.hopper import hopper_attention, hopper_attention_of_product

    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    where = SingleDeviceSharding(topology("H100", 1, 1)[0])
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # noqa: E731
    heads = lambda n: array((2, 512, n, size), jnp.bfloat16)  # noqa: E731

    def gradients(arrays, segments, key):
        rest = segments if packed else None, key if rate else None, rate
        attend = hopper_attention if groups else hopper_attention_of_product
        return jax.grad(lambda arrays: attend(*arrays, *rest).astype(jnp.float32).sum())(arrays)

    apart = heads(4), heads(groups or 1), heads(groups or 1)
    product = array((2, 512, 3, 4, size), jnp.bfloat16), array((3, 4, size), jnp.bfloat16)
    others = array((2, 512), jnp.int32), array((2, 2), jnp.uint32)
    jax.jit(gradients).lower(apart if groups else product, *others).compile()
    said = "".join(capfd.readouterr())
    found = re.findall(r"function properties for (\w+?)_mosaic.*?(\d+) bytes spill stores", said, re.S | re.I)
    assert {name for name, _ in found} == {"forward_kernel", "queries_kernel", "keys_kernel"}
    most = {"forward_kernel": spilled[0], "queries_kernel": 0, "keys_kernel": spilled[1]}
    assert all(int(spills) <= most[name] for name, spills in found), found


@pytest.mark.parametrize(("recomputed", "forward"), [(True, 2), (False, 1)])
def test_an_update_with_them(recomputed: bool, forward: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanned layers, over two devices that share the heads; the forward kernel runs once, or again if recomputed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fields = {"model.n_layers": 2, "model.d_model": 128, "model.n_heads": 2, "model.d_ff": 256, "model.vocab_size": 512}
    fields |= {"training.batch_size": 4, "training.gradient_accumulation_steps": 2, "data.max_length": 256}
    fields |= {"model.attention": "mosaic", "model.scan_layers": True, "training.tensor_parallel": 2}
    fields |= {"model.gradient_checkpointing": recomputed}
    found = plan(replace_fields(load_config("gpt2_124m"), fields), "H100", 2)
    assert found.attention == "mosaic" and found.parts["attention"].kernels >= 2 * 2 * (forward + 2)
    tiles = forward * 2 * 3 * (128 * 128) + (3 + 4) * 6 * (128 * 64)  # the last: those of queries and of keys
    assert found.parts["attention"].flops == 2 * 2 * (4 * 1 * 64 * 2) * tiles  # layers, micro-batches; rows, heads
