#!/usr/bin/env bash
# The package rouge counts each word once: 'no no no no' has a ROUGE-1 and a ROUGE-L of 1 against 'no'.
#
# rouge 1.0.1. ROUGE counts n-grams with their repetitions, clipped to those of the reference, so that one would take a
# model that repeats itself to lose precision: 'the cat' four times has a precision of 0.25 against 'the cat'. By
# default this package makes sets of words: precision, recall and F are 1, for ROUGE-1 and ROUGE-L. ROUGE-L is the words
# of the longest common subsequence as a set. Loops, the commonest fault of small models, are not seen at all, and
# recall is of other words as well: 'the' in 'the cat sat on the mat' is one of five. The README names neither this nor
# the setting, exclusive, that turns it off; its name says nothing, and it is True. Scores cannot be compared with
# rouge-score's, which papers give.
# Right: Rouge(exclusive=False), which counts as ROUGE does, or rouge-score. In the library: rouge/rouge_score.py,
# Ngrams (set or list), rouge_n and rouge_l_summary_level.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rouge==1.0.1
cat >"$folder/show.py" <<'PYTHON'
from rouge import Rouge

pairs = [
    ("no no no no", "no"),
    ("the cat the cat the cat the cat", "the cat"),
    ("the the the the", "the cat sat on the mat"),
    ("a cat sat", "a cat sat"),
]
for exclusive in (True, False):
    scorer = Rouge(exclusive=exclusive)
    for answer, reference in pairs:
        (scores,) = scorer.get_scores(answer, reference)
        shown = [f"{name} {scores[name]['p']:.2f} {scores[name]['r']:.2f}" for name in ("rouge-1", "rouge-2", "rouge-l")]
        print(f"exclusive={exclusive}, {answer} | {reference}: {', '.join(shown)}")
default = Rouge().get_scores(*pairs[0]) == Rouge(exclusive=True).get_scores(*pairs[0])
print(f"the default is exclusive=True: {default}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "exclusive=True, no no no no | no: rouge-1 1.00 1.00, rouge-2 0.00 0.00, rouge-l 1.00 1.00
exclusive=True, the cat the cat the cat the cat | the cat: rouge-1 1.00 1.00, rouge-2 0.50 1.00, rouge-l 1.00 1.00
exclusive=True, the the the the | the cat sat on the mat: rouge-1 1.00 0.20, rouge-2 0.00 0.00, rouge-l 1.00 0.20
exclusive=True, a cat sat | a cat sat: rouge-1 1.00 1.00, rouge-2 1.00 1.00, rouge-l 1.00 1.00
exclusive=False, no no no no | no: rouge-1 0.25 1.00, rouge-2 0.00 0.00, rouge-l 0.25 1.00
exclusive=False, the cat the cat the cat the cat | the cat: rouge-1 0.25 1.00, rouge-2 0.14 1.00, rouge-l 0.25 1.00
exclusive=False, the the the the | the cat sat on the mat: rouge-1 0.50 0.33, rouge-2 0.00 0.00, rouge-l 0.50 0.33
exclusive=False, a cat sat | a cat sat: rouge-1 1.00 1.00, rouge-2 1.00 1.00, rouge-l 1.00 1.00
the default is exclusive=True: True" ]] || {
  echo "this has changed"
  exit 1
}
