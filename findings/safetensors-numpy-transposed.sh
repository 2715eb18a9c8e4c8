#!/usr/bin/env bash
# safetensors 0.8 writes a transposed NumPy array with its numbers in the wrong places, without a word.
#
# safetensors 0.8.0 with numpy 2.4.6; 0.7.0 is right. A kernel is often saved transposed, as JAX has [in, out] and PyTorch
# [out, in]. One would take safetensors.numpy.save_file for writing what the array says, or for refusing one that isn't
# contiguous, as safetensors.torch does; its docstring asks for contiguous ones, but nothing looks. It writes the bytes as they
# lie in memory under the transposed shape: a file that loads anywhere and is another matrix. Any array in Fortran order is hit,
# also one that scikit-learn has made, and so is a slice with a step, where it writes what lies in between. Right:
# np.ascontiguousarray before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
cat >"$folder/save.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {"transposed": kernel.T, "every second": np.arange(6, dtype=np.float32)[::2]}
arrays["contiguous"] = np.ascontiguousarray(kernel.T)
save_file(arrays, sys.argv[1])
loaded = load_file(sys.argv[1])
equal = {name: "equal" if np.array_equal(x, loaded[name]) else "differs" for name, x in arrays.items()}
print(safetensors.__version__, ", ".join(f"{name} {how}" for name, how in equal.items()))
PYTHON
found=""
for version in 0.7.0 0.8.0; do
  "$folder/venv/bin/pip" install -q "safetensors==$version"
  found+="$("$folder/venv/bin/python" "$folder/save.py" "$folder/model.safetensors")"$'\n'
done
echo "$found"
[[ $found == "0.7.0 transposed equal, every second equal, contiguous equal
0.8.0 transposed differs, every second differs, contiguous equal
" ]] || {
  echo "this has changed"
  exit 1
}
