#!/usr/bin/env bash
# With malloc's arenas limited to one, the threads of the tokenizers library take longer than one thread would.
#
# Python 3.11, tokenizers 0.23.3, glibc. MALLOC_ARENA_MAX is advised, with values of 1 to 4, to bound the memory of processes with
# many threads in containers, and one would expect it to cost a few percent: a thread has a cache of small pieces of its own.
# But training a BPE and encoding make and free a great many strings, more than that cache holds, and each goes through the one
# arena's lock: two threads take two to five times as long as without the limit, and longer than a single thread does, with
# the same result. With two arenas for two threads nothing is lost.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cat >"$folder/train.py" <<'PYTHON'
import sysconfig
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
start = time.perf_counter()
tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
tokens = sum(len(each.ids) for each in tokenizer.encode_batch_fast(texts))
print(f"{time.perf_counter() - start:.2f} {tokens}")
PYTHON
cat >"$folder/compare.py" <<'PYTHON'
import os
import subprocess
import sys


def measured(arenas: int, threads: int) -> tuple[float, int]:
    """Seconds, the best of three, and tokens; 0 arenas are as many as glibc makes."""
    own = {"MALLOC_ARENA_MAX": str(arenas), "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, sys.argv[1]]
    runs = [subprocess.run(command, env=os.environ | own, check=True, capture_output=True).stdout for _ in range(3)]
    seconds, tokens = min((float(seconds), int(tokens)) for seconds, tokens in map(bytes.split, runs))
    print(f"arenas {arenas}, threads {threads}: {seconds:.2f} s, {tokens} tokens")
    return seconds, tokens


measured(0, 1)
free, tokens = measured(0, 2)
two, _ = measured(2, 2)
alone, _ = measured(1, 1)
one, as_many = measured(1, 2)
sys.exit(not (tokens == as_many and one > 1.5 * free and one > 1.5 * two and one > 1.1 * alone))
PYTHON
"$folder/venv/bin/python" "$folder/compare.py" "$folder/train.py" || {
  echo "this has changed"
  exit 1
}
