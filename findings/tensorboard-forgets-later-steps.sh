#!/usr/bin/env bash
# After a value for an earlier step, TensorBoard shows none of the later ones: its fast loader drops them from the curve.
#
# tensorboard 2.21.0 with tensorboard-data-server 0.7.2 and tensorboardX 2.6.5. When a run is at step 5000, an earlier
# checkpoint is evaluated once more, and its loss goes into the same curve at its own step, 1000. One would take this for
# one more point. But the loader that `tensorboard` uses by itself takes a step that is not beyond the last one for a
# restart, and drops every point from there on: the curve ends at 1000. The file has them all, and EventAccumulator and
# --load_fast=false show them all, so that a script and the page differ. A run that is resumed a hundred steps back and soon
# stopped loses those hundred in the same way. Right: a tag of its own for such values, or --load_fast=false.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorboard==2.21.0 tensorboard-data-server==0.7.2 tensorboardX==2.6.5 numpy==2.4.6
cat >"$folder/board.py" <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

folder = Path(sys.argv[1]) / "logs"
with SummaryWriter(str(folder / "run")) as writer:
    for step in (0, 1000, 2000, 3000, 4000, 5000, 1000):
        writer.add_scalar("loss", 1.0, step)


def shown(fast: str) -> list[int]:
    """The steps that the page would draw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port), "--load_fast", fast]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            time.sleep(1)
            try:
                address = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=run&tag=loss"
                return [step for _, step, _ in json.load(urlopen(address))]
            except URLError:  # not there yet, or it hasn't read the file yet
                pass
        raise SystemExit("no answer")
    finally:
        server.terminate()
        server.wait()


events = EventAccumulator(str(folder / "run"))
events.Reload()
print("EventAccumulator:", [event.step for event in events.Scalars("loss")])
print("tensorboard --load_fast=false:", shown("false"))
print("tensorboard:", shown("auto"))
PYTHON
found=$("$folder/venv/bin/python" "$folder/board.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "EventAccumulator: [0, 1000, 2000, 3000, 4000, 5000, 1000]
tensorboard --load_fast=false: [0, 1000, 2000, 3000, 4000, 5000, 1000]
tensorboard: [0, 1000]" ]] || {
  echo "this has changed"
  exit 1
}
