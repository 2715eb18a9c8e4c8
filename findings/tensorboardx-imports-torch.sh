#!/usr/bin/env bash
# `import tensorboardX` imports all of PyTorch where it is installed, for the names in its annotations.
#
# Python 3.11, tensorboardX 2.6.5, torch 2.13.0. One would take the package, which exists to write event files without PyTorch
# or TensorFlow, to leave both alone until a tensor is handed to it; it imports TensorFlow nowhere. But its writer begins with
# "try: import torch", and uses the class in annotations alone: where tensors are converted, it looks at the name of their type
# and imports once more. So a program that logs a number holds the memory of PyTorch, with whatever libraries of CUDA that
# brings, and starts as much later. With torch made unimportable meanwhile (None in sys.modules), the files have the same
# events, and torch can be imported afterwards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorboardX==2.6.5 torch==2.13.0 numpy==2.4.6
cat >"$folder/write.py" <<'PYTHON'
import hashlib
import sys
import time
from pathlib import Path

hide = sys.argv[1] == "hidden"
if hide:
    sys.modules["torch"] = None
import tensorboardX  # noqa: E402

if hide:
    del sys.modules["torch"]
imported = "torch" in sys.modules
time.time = lambda: 0.0
writer = tensorboardX.SummaryWriter(sys.argv[2])
writer.add_scalar("loss", 1.5, 1)
writer.add_histogram("norms", [1.0, 2.0, 4.0], 1)
if hide:  # tensors are taken all the same
    import torch

    writer.add_scalar("of a tensor", torch.tensor(2.5), 2)
else:
    writer.add_scalar("of a tensor", 2.5, 2)
writer.close()
(written,) = Path(sys.argv[2]).iterdir()
print("torch is imported" if imported else "torch is not imported", hashlib.sha256(written.read_bytes()).hexdigest()[:8])
PYTHON
plain=$("$folder/venv/bin/python" "$folder/write.py" plain "$folder/plain")
hidden=$("$folder/venv/bin/python" "$folder/write.py" hidden "$folder/hidden")
echo "plain: $plain"
echo "hidden: $hidden"
[[ ${plain% *} == "torch is imported" && ${hidden% *} == "torch is not imported" && ${plain##* } == "${hidden##* }" ]] || {
  echo "this has changed"
  exit 1
}
