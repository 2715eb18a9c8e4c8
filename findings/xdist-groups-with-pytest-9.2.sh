#!/usr/bin/env bash
# pytest-xdist's groups have no effect with pytest 9.2: tests of one group run on several workers, without a word.
#
# pytest 9.2.0 with pytest-xdist 3.8.0, each the newest on 2026-11-28. With `-n 2 --dist loadgroup`, tests that are marked
# `xdist_group("name")` are documented to run on one worker. xdist does that by writing "@name" to the end of an item's
# `_nodeid`, from which the scheduler reads it back; pytest 9.2 takes a test's id from elsewhere, so no id has a group.
# Fixtures of a module are then made by every worker, and tests that must not meet do. `--dist loadfile` still keeps a
# file together. With pytest 9.1.0 the groups work.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat >"$folder/test_groups.py" <<'PYTHON'
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(8))
def test_of_one_group(i, worker_id):
    with open("workers.txt", "a") as file:
        file.write(f"{worker_id}\n")
    time.sleep(0.2)
PYTHON
workers() {
  "$folder/venv/bin/pip" install -q "pytest==$1" pytest-xdist==3.8.0
  rm -f "$folder/workers.txt"
  (cd "$folder" && venv/bin/python -m pytest -q -p no:cacheprovider -n 2 --dist "$2" test_groups.py >/dev/null)
  sort -u "$folder/workers.txt" | wc -l | tr -d ' '
}
found="pytest 9.2.0, loadgroup: $(workers 9.2.0 loadgroup) workers; loadfile: $(workers 9.2.0 loadfile); pytest 9.1.0, loadgroup: $(workers 9.1.0 loadgroup)"
echo "$found"
[[ $found == "pytest 9.2.0, loadgroup: 2 workers; loadfile: 1; pytest 9.1.0, loadgroup: 1" ]] || {
  echo "this has changed"
  exit 1
}
