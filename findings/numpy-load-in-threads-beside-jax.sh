#!/usr/bin/env bash
# On Python 3.11, numpy.load in two threads at once raises SystemError now and then, once JAX has been imported.
#
# Python 3.11.7, jax 0.10.2, numpy 2.4.6. One would take reading a .npy file from several threads, as loaders do, to be safe:
# nothing is shared. But numpy reads a file's header with ast.literal_eval; Python 3.11 checks how deep its parser is in a
# number that all threads share, which is right as long as the interpreter doesn't change threads within; and JAX, when it is
# imported, registers a callback of the garbage collector, Python code in which it may. If the two threads are in calls of
# different depth by then: "AST constructor recursion depth mismatch". Without JAX it isn't seen, nor on Python 3.12 and 3.13.
# What helps is a lock around numpy.load. The threshold and the interval below only make a rare event frequent.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/load.py" <<'PYTHON'
import gc
import sys
import threading

import numpy as np

path = sys.argv[1]
np.save(path, np.arange(10))
gc.set_threshold(10)
sys.setswitchinterval(1e-6)


def faults(threads: int) -> set[str]:
    """What 3,000 loads in each thread raise, numbers left out."""
    found = set()

    def load(calls: int) -> None:
        """From within so many calls."""
        if calls:
            return load(calls - 1)
        for _ in range(3000):
            try:
                np.load(path)
            except SystemError as error:
                found.add(str(error).split(" (")[0])

    started = [threading.Thread(target=load, args=(100 * number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return found


print("two threads:", faults(2) or "fine")
import jax  # noqa: E402, F401

print("one thread beside JAX:", faults(1) or "fine")
print("two threads beside JAX:", faults(2) or "fine")
PYTHON
found=$("$folder/venv/bin/python" "$folder/load.py" "$folder/a.npy" 2>"$folder/stderr")
echo "$found"
[[ $found == "two threads: fine
one thread beside JAX: fine
two threads beside JAX: {'AST constructor recursion depth mismatch'}" ]] || {
  echo "this has changed"
  exit 1
}
