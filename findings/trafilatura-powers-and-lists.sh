#!/usr/bin/env bash
# trafilatura reads 10 to the power of 6 as 106 and list items without their numbers, and drops empty lines of code.
#
# trafilatura 2.3.1. Texts to train on are read from web pages with it, by extract(page), whose default output is plain text. One
# would take numbers for safe. But what stands above or below the line comes out beside the number before it, without a
# space or a sign: 10<sup>6</sup> is 106, 2<sup>-3</sup> is 2-3, one and a half is 11/2, and 250 people with the third
# footnote are 2503. Items of an <ol> are "- ", so that "see step 2" has no step 2. In Markdown powers stay, as <sup>, but a
# list that starts at 5 starts at 1 again. In code, empty lines are gone in both. Right: output_format="markdown", or write
# powers as ^{...} in the page before extract.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trafilatura==2.3.1 lxml_html_clean==0.4.6
cat >"$folder/show.py" <<'PYTHON'
import trafilatura

words = "This paragraph has as many words as a text of an article has, so that it is taken for one. " * 4
parts = ["<p>A mass of 10<sup>6</sup> and 2<sup>-3</sup>, 1<sup>1</sup>/<sub>2</sub> cups, 250<sup>3</sup> people.</p>"]
parts += ['<ol start="5"><li>five</li><li>six, then see step 5</li></ol>']
parts += ["<pre><code>def f():\n    x = 1\n\n    return x\n</code></pre>"]
page = f"<html><body><article><h1>Title</h1><p>{words}</p>{''.join(parts)}<p>{words}</p></article></body></html>"
for name, options in (("plain", {}), ("markdown", {"output_format": "markdown"})):
    print(f"--- {name}")
    for line in trafilatura.extract(page, **options).split("\n"):
        if line and "paragraph" not in line and "Title" not in line:
            print(line)
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr") || { tail -5 "$folder/stderr"; exit 1; }
echo "$found"
[[ $found == "--- plain
A mass of 106 and 2-3, 11/2 cups, 2503 people.
- five
- six, then see step 5
def f():
    x = 1
    return x
--- markdown
A mass of 10<sup>6</sup> and 2<sup>-3</sup>, 1<sup>1</sup>/<sub>2</sub> cups, 250<sup>3</sup> people.
1. five
2. six, then see step 5
\`\`\`
def f():
    x = 1
    return x
\`\`\`" ]] || {
  echo "this has changed"
  exit 1
}
