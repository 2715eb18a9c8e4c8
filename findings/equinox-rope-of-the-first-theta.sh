#!/usr/bin/env bash
# In Equinox, all rotary embeddings of one size use the theta of the one that was called first, or with the longest text.
#
# equinox 0.13.8 with jax 0.10.2, on CPU. One would take RotaryPositionalEmbedding(64, theta=1_000_000) for one with that
# theta, whatever else the program has built: a second model to compare with, or layers of two kinds, as in Gemma 3, where
# layers with a window have a theta of 10,000 and the others one of 1,000,000. But the tables of cosines and sines are kept
# for the whole process by size and type alone. The first one that is called makes them with its theta, and all others use
# these; one that is called with more positions than the table has makes it anew, and from then on the others have its
# theta. So two models with two thetas compute as if they had one, and which one depends on what ran before. Nothing warns.
# Right: eqx.clear_caches() before another theta (it throws all compiled programs away, too), or rotary
# positions of one's own as soon as there are two thetas.
# In the library: equinox/nn/_embedding.py, internal_rope_embedding_cache, whose key is (embedding_size, dtype).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import equinox as eqx
import jax
import jax.numpy as jnp

THETAS = (10_000, 1_000_000)
text = jax.random.normal(jax.random.key(0), (128, 64))
right = {}
for theta in THETAS:
    eqx.clear_caches()
    right[theta] = eqx.nn.RotaryPositionalEmbedding(64, theta=theta)(text)


def computes(rope: eqx.nn.RotaryPositionalEmbedding, length: int) -> str:
    """Whose positions `rope` gives the first `length` vectors."""
    found = rope(text[:length])
    return " and ".join(f"{theta:,}" for theta in THETAS if jnp.allclose(found, right[theta][:length], atol=1e-4))


def show(name: str, *calls: tuple[int, int]) -> None:
    eqx.clear_caches()
    ropes = {theta: eqx.nn.RotaryPositionalEmbedding(64, theta=theta) for theta in THETAS}
    shown = [f"{theta:,} at {length} positions is {computes(ropes[theta], length)}" for theta, length in calls]
    print(f"{name}: {'; '.join(shown)}")


small, large = THETAS
show("alone", (large, 32))
show("second", (small, 32), (large, 32))
show("first", (large, 32), (small, 32))
show("longer", (small, 32), (large, 64), (small, 32))
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "alone: 1,000,000 at 32 positions is 1,000,000
second: 10,000 at 32 positions is 10,000; 1,000,000 at 32 positions is 10,000
first: 1,000,000 at 32 positions is 1,000,000; 10,000 at 32 positions is 1,000,000
longer: 10,000 at 32 positions is 10,000; 1,000,000 at 64 positions is 1,000,000; 10,000 at 32 positions is 1,000,000" ]] || {
  echo "this has changed"
  exit 1
}
