#!/usr/bin/env bash
# The number of threads that a Unigram of sentencepiece is trained with decides which ids its pieces have, and a few pieces.
#
# sentencepiece 0.2.3. num_threads looks like a matter of time alone, to be set to the number of cores, and a vocabulary that
# is trained on the same text with the same options is the same, each time. It is, for one number of threads. With another,
# hundreds of the 2,000 ids belong to another piece, and now and then a piece is another one, so that a model trained with one
# vocabulary doesn't go with the other. Each thread adds up expected counts of its own part of the words in float32, and the
# sums of the threads are added (RunEStep and PruneSentencePieces in unigram_model_trainer.cc): rounding depends on the number
# of parts, and pieces are kept, cut off and numbered by those scores. The default is 16 whatever the machine has, which is
# the same everywhere. A BPE doesn't depend on it. What helps: leave num_threads alone, or write it down as part of the
# recipe.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentencepiece==0.2.3
cat >"$folder/train.py" <<'PYTHON'
import io
import sys
import sysconfig
from pathlib import Path

import sentencepiece

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
lines = [line for file in files for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def trained(kind: str, **options: int) -> list[str]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:20_000]),
        model_writer=model,
        model_type=kind,
        vocab_size=2000,
        minloglevel=2,
        **options,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(i) for i in range(len(processor))]


moved = {}
for kind in ("unigram", "bpe"):
    default = trained(kind)
    for threads in (16, 1, 2):
        pieces = trained(kind, num_threads=threads)
        moved[kind, threads] = sum(a != b for a, b in zip(default, pieces, strict=True))
        others = len({*default} - {*pieces})
        print(f"{kind}, {threads} threads: {moved[kind, threads]} ids have another piece, {others} pieces are gone")
same = moved["unigram", 16] == 0 and all(moved["bpe", threads] == 0 for threads in (16, 1, 2))
sys.exit(not (same and all(moved["unigram", threads] > 50 for threads in (1, 2))))
PYTHON
"$folder/venv/bin/python" "$folder/train.py" 2>"$folder/stderr" || {
  echo "this has changed"
  exit 1
}
