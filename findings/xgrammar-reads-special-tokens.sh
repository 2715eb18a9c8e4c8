#!/usr/bin/env bash
# xgrammar takes special tokens for the text that their names are: the end of a text stands for four letters of it.
#
# xgrammar 0.2.9 with transformers 5.24.0. One would take a grammar to allow the stop token once the text is complete, and tokens
# such as <pad> never, as they are no text. TokenizerInfo.from_huggingface gives each its name as its bytes, so a grammar
# that allows "<" and the letters allows them: in a JSON string or [ -~]{5} one <pad> is five characters, of which nothing is
# left when the answer is decoded without special tokens. Worse, where the name of the stop token would complete the text,
# as "</s>" does for [ -~]+ or [ -~]{4}, it is allowed first of all and ends the text: an empty answer, taken for a match.
# Where it would not, it waits for its turn. Right: a TokenizerInfo whose vocabulary has "" for all special tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xgrammar==0.2.9 transformers==5.24.0 torch==2.13.0
cat >"$folder/grammar.py" <<'PYTHON'
import transformers
import xgrammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
options = {"vocab_size": 259, "special_tokens": list(special.values()), "show_progress": False}
trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
words.train_from_iterator(["a text"], trainer)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
usual = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
no_text = ["" if name in special.values() else name for name in names]
emptied = xgrammar.TokenizerInfo(no_text, vocab_type=xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[2])
quote = tokenizer.convert_tokens_to_ids('"')
for name, info in (("usual", usual), ("emptied", emptied)):
    compiler = xgrammar.GrammarCompiler(info)
    for regex in ("[ -~]+", "[ -~]{4}", "[ -~]{5}", "[a-z]+"):
        found = []
        for token in ("</s>", "<pad>"):
            matcher = xgrammar.GrammarMatcher(compiler.compile_regex(regex))
            taken = matcher.accept_token(tokenizer.convert_tokens_to_ids(token))
            found.append(f"{token} {'ends the text' if matcher.is_terminated() else 'taken' if taken else 'not taken'}")
        print(f"{name}, {regex} first: {', '.join(found)}")
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema('{"type": "string", "minLength": 5}'))
    taken = all(matcher.accept_token(token) for token in (quote, 0, quote, 2))
    print(f'{name}, a string of five characters: "<pad>" {"taken" if taken else "not taken"}')
PYTHON
found=$("$folder/venv/bin/python" "$folder/grammar.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "usual, [ -~]+ first: </s> ends the text, <pad> taken
usual, [ -~]{4} first: </s> ends the text, <pad> not taken
usual, [ -~]{5} first: </s> not taken, <pad> taken
usual, [a-z]+ first: </s> not taken, <pad> not taken
usual, a string of five characters: \"<pad>\" taken
emptied, [ -~]+ first: </s> not taken, <pad> not taken
emptied, [ -~]{4} first: </s> not taken, <pad> not taken
emptied, [ -~]{5} first: </s> not taken, <pad> not taken
emptied, [a-z]+ first: </s> not taken, <pad> not taken
emptied, a string of five characters: \"<pad>\" not taken" ]] || {
  echo "this has changed"
  exit 1
}
