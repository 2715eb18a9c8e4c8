#!/usr/bin/env bash
# sacrebleu scores the first text alone if the references are a list per text, and says nothing of the others.
#
# sacrebleu 2.6.0. corpus_bleu, corpus_chrf and corpus_ter take references as a list per set, [[all first ones], [all second
# ones]]; nltk and evaluate take a list per text, [[those of text 1], [those of text 2]]. One would take the wrong one for
# an error, as a list of one reference doesn't fit three answers. But answers and lists are walked side by side to the end
# of the shortest: the first answer alone is scored, against all texts' references together, and that is the number for the
# whole corpus, here 100 for three answers of which two are wrong. A file of references that ends early cuts the answers in
# the same way. Nothing is said. Right: [references] for one reference per text, list(zip(*lists)) for several, and a look
# at the lengths.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sacrebleu==2.6.0
cat >"$folder/bleu.py" <<'PYTHON'
import sacrebleu

answers = ["the cat sat on the mat", "no idea what this text says", "all of this is wrong too"]
references = ["the cat sat on the mat", "dogs run in the park today", "it rained for the whole week"]
ways = {"a list per set": [references], "a list per text": [[text] for text in references]}
ways |= {"the last reference missing": [references[:2]]}
for name, sets in ways.items():
    metrics = {"BLEU": sacrebleu.corpus_bleu, "chrF": sacrebleu.corpus_chrf, "TER": sacrebleu.corpus_ter}
    scores = [f"{metric} {function(answers, sets).score:.1f}" for metric, function in metrics.items()]
    print(f"{name}: {', '.join(scores)}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/bleu.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "a list per set: BLEU 33.3, chrF 35.1, TER 66.7
a list per text: BLEU 100.0, chrF 100.0, TER 0.0
the last reference missing: BLEU 50.0, chrF 49.8, TER 50.0" ]] || {
  echo "this has changed"
  exit 1
}
