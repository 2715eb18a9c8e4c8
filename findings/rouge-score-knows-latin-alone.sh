#!/usr/bin/env bash
# rouge-score gives a text in Cyrillic, Greek, Chinese or Hindi 0 against itself, and drops letters with accents.
#
# rouge-score 0.1.2, which evaluate and the evaluation harness use. One would take a text to have a score of 1 with
# itself. The default tokenizer replaces everything but a to z and 0 to 9 by spaces: of a Russian text nothing is left,
# and the score is 0, whatever a model writes; nothing is said. In languages with a few other letters it is worse, as
# the score looks right: of German "Müller fährt" are left "m", "ller", "f" and "hrt", so that words which share a rest
# agree, "für" and "fur" do not, and a text that mixes scripts is scored by its numbers and English names alone. Code is
# scored without its signs: x_1 = -3.5 is as good as x 1 3 5. Right: a tokenizer of one's own (RougeScorer(...,
# tokenizer=...), whose tokenize splits by words).
# In the library: rouge_score/tokenize.py, NON_ALPHANUM_RE.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rouge-score==0.1.2
cat >"$folder/show.py" <<'PYTHON'
from rouge_score import rouge_scorer


class Words:
    def tokenize(self, text: str) -> list[str]:
        return text.lower().split()


default = rouge_scorer.RougeScorer(["rouge1"])
words = rouge_scorer.RougeScorer(["rouge1"], tokenizer=Words())
CASES = {
    "English, the same text": ("the model writes", "the model writes"),
    "Russian, the same text": ("\u043c\u043e\u0434\u0435\u043b\u044c \u043f\u0438\u0448\u0435\u0442",) * 2,
    "Chinese, the same text": ("\u6a21\u578b \u5199\u4f5c",) * 2,
    "Greek, another text but for 2026": ("\u03bd\u03b1\u03b9 2026", "\u03cc\u03c7\u03b9 2026"),
    "German, another word with the same rest": ("\u00e4hre", "\u00f6hre"),
    "code, another program": ("x_1 = -3.5", "x (1) + 3 / 5"),
}
for name, (target, prediction) in CASES.items():
    scores = [scorer.score(target, prediction)["rouge1"].fmeasure for scorer in (default, words)]
    print(f"{name}: {scores[0]:.2f}, by words {scores[1]:.2f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "English, the same text: 1.00, by words 1.00
Russian, the same text: 0.00, by words 1.00
Chinese, the same text: 0.00, by words 1.00
Greek, another text but for 2026: 1.00, by words 0.50
German, another word with the same rest: 1.00, by words 0.00
code, another program: 1.00, by words 0.00" ]] || {
  echo "this has changed"
  exit 1
}
