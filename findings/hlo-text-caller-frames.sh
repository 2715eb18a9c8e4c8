#!/usr/bin/env bash
# In the text of a compiled program (HLO), a stack frame's parent_frame_id is one more than its caller's id.
#
# jaxlib 0.10.2, the same in 0.11.2. An optimized program's text has tables at its top, FileNames, FunctionNames,
# FileLocations and StackFrames, and instructions name a stack_frame_id. One would take "5 {... parent_frame_id=3}" to be
# called by frame 3. It is called by frame 2: the number is written plus one, and 1 means that there is no caller. Read as
# it looks, a first frame is its own caller, and call stacks repeat parts of themselves. All other ids are as they look.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/frames.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp


def innermost(x):
    return jnp.sin(x)


def middle(x):
    return innermost(x) * 2


def outermost(x):
    return middle(x).sum()


text = jax.jit(outermost).lower(jnp.ones(8)).compile().as_text()
functions = dict(re.findall(r'^(\d+) "((?:inner|mid|outer)\w+)"$', text, re.M))
locations = dict(re.findall(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+)", text, re.M))
frames = {i: (place, parent) for i, place, parent in re.findall(
    r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}", text, re.M)}
frame = re.search(r"/sin\".*?stack_frame_id=(\d+)", text)[1]
for name, step in (("as it looks", 0), ("less one", 1)):
    chain, at = [], frame
    while at in frames and len(chain) < 6:
        chain.append(functions.get(locations[frames[at][0]], "the module"))
        at = str(int(frames[at][1] or 1) - step)
    print(f"{name}: {' < '.join(chain)}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/frames.py")
echo "$found"
[[ $found == *"less one: innermost < middle < outermost < the module"* && $found != *"as it looks: innermost < middle < outermost < the module" ]] || {
  echo "this has changed"
  exit 1
}
