"""Products in 16 bits on CPUs that can and can't multiply them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.model import Transformer
from jaxlm.ops import platform
from jaxlm.ops.matmul import einsum
from jaxlm.train.loss import loss_sums

PRODUCT = re.compile(r"stablehlo\.dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)")


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """Makes the CPU say something else of itself."""

    def says(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(platform, "CPU_INFO", tmp_path / "cpuinfo")
        platform.cpu_has_bfloat16.cache_clear()

    yield says
    platform.cpu_has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu fma avx2 avx512f avx512_bf16 vaes\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd asimdhp i8mm bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu fma avx2\n", False),
        ("processor\t: 0\nflags\t\t: fma avx512f\nbugs\t\t: avx512_bf16\n", False),
        ("processor\t: 0\n", False),
    ],
)
def test_a_cpu_says_what_it_can_do(cpu, text, has):
    cpu(text)
    assert platform.cpu_has_bfloat16() is has


def test_where_the_system_does_not_say(cpu, monkeypatch, tmp_path):
    cpu("flags : avx512_bf16\n")
    monkeypatch.setattr(platform, "CPU_INFO", tmp_path / "missing")
    assert not platform.cpu_has_bfloat16()


def factors_of(function, *arguments, target="cpu", exact=0):
    """Dtypes of all factors of the products in a program, but for the `exact` ones that sum embeddings' gradients."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(target,)).as_text()
    products = [line for line in text.splitlines() if PRODUCT.search(line)]
    rounded = [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line]
    found = {dtype for line in rounded for dtype in PRODUCT.search(line).groups()}
    assert found and len(products) - len(rounded) == exact, text
    return found


@pytest.mark.parametrize(("flags", "expected"), [("avx2 avx512_bf16", "bf16"), ("avx2", "f32")])
def test_updates_and_generation_multiply_what_the_cpu_can(cpu, flags, expected):
    cpu(f"flags : {flags}\n")
    config = ModelConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=1, d_ff=32, max_seq_len=8)
    model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((1, 8), jnp.int32)
    graphdef, params = nnx.split(model)

    def loss(params):
        of = nnx.merge(graphdef, params)
        return loss_sums(of(tokens), of.output_matrix(), tokens, jnp.ones((1, 8)))[0]

    def next_token(params):
        of = nnx.merge(graphdef, params)
        _, caches = of.prefill(tokens[:, :4])
        return of.decode(tokens[:, :1], jnp.array([3]), caches)[0]

    for function, exact in ((jax.grad(loss), 4), (next_token, 0)):  # on a GPU, two for tokens and two for positions
        assert factors_of(function, params) == {expected}
        assert factors_of(function, params, target="cuda", exact=exact) == {"bf16"}


@pytest.mark.parametrize(("spec", "expected"), [("bsk,btk->bst", "bf16"), ("bsnr,nro->bsno", "f32")])
def test_what_the_cpu_has_no_product_for_is_widened(cpu, spec, expected):
    """XLA compiles the second in bfloat16, too, for CPUs that multiply it, and can't run it."""
    cpu("flags : avx2 avx512_bf16 amx_bf16\n")
    shapes = (
        [dict(zip("bstnrok", (2, 8, 8, 3, 4, 16, 16), strict=True))[axis] for axis in x]
        for x in spec.split("->")[0].split(",")
    )
    x, y = (jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    assert factors_of(lambda x, y: einsum(spec, x, y), x, y) == {expected}


def test_the_result_is_the_same(cpu):
    x, y = (jax.random.normal(jax.random.key(i), (8, 64), jnp.bfloat16) for i in range(2))
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    for flags in ("avx2", "avx2 avx512_bf16"):
        cpu(f"flags : {flags}\n")
        z = einsum("ik,jk->ij", x, y, jnp.float32)
        assert z.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(z), exact, rtol=1e-5, atol=1e-5)
