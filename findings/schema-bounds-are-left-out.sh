#!/usr/bin/env bash
# outlines-core and lm-format-enforcer take schemas with minimum, maximum, multipleOf or uniqueItems and enforce none of them.
#
# outlines-core 0.2.14, lm-format-enforcer 0.11.3 and, beside them, llguidance 1.9.1. Text that is generated under a JSON
# schema is taken for valid under it: that is what these packages are for, and outlines-core raises an error for parts that it
# does not know (format: hostname). But of a number's schema both read the type alone: {"minimum": 1, "maximum": 5}, a grade, lets
# -3 and 500 through, multipleOf does not count, and an array with uniqueItems holds the same item twice. On the other side
# both forbid the further fields that additionalProperties: true allows, and in lm-format-enforcer a list without
# maxItems ends after 20 items at the latest, as its setting max_json_array_length is 20. No warning comes with any of it.
# llguidance enforces the bounds and multiples, and raises an error for uniqueItems. Right: validate the answers against the
# schema all the same, or write grades as an enum.
# In the libraries: build_regex_from_schema, and lmformatenforcer/jsonschemaparser.py, which has no bounds of numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q outlines-core==0.2.14 lm-format-enforcer==0.11.3 llguidance==1.9.1
cat >"$folder/show.py" <<'PYTHON'
import json
import re

import llguidance
from lmformatenforcer import JsonSchemaParser
from outlines_core.json_schema import build_regex_from_schema

BYTES = [bytes([i]) for i in range(256)] + [b"<end>"]
TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(type("Bytes", (), {
    "eos_token_id": 256, "bos_token_id": None, "tokens": BYTES, "special_token_ids": [256], "__call__": lambda _, s: list(s)
})()))


def outlines(schema: dict, text: str) -> bool:
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None


def enforcer(schema: dict, text: str) -> bool:
    parser = JsonSchemaParser(schema)
    for character in text:
        if character not in parser.get_allowed_characters():
            return False
        parser = parser.add_character(character)
    return parser.can_end()


def guidance(schema: dict, text: str) -> bool | str:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    matcher = llguidance.LLMatcher(TOKENIZER, grammar, log_level=0)
    if matcher.is_error():
        return "error"
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


grade = {"type": "integer", "minimum": 1, "maximum": 5}
share = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
numbers = {"type": "array", "items": {"type": "integer"}}
fields = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
for name, schema, texts in (
    ("1 to 5", grade, ["4", "-3", "500"]),
    ("0 to 1", share, ["0.5", "-2.5"]),
    ("multiple of 5", {"type": "integer", "multipleOf": 5}, ["10", "7"]),
    ("unique", numbers | {"uniqueItems": True}, ["[1,2]", "[1,1]"]),
    ("any length", numbers, [json.dumps([1] * 20), json.dumps([1] * 21)]),
    ("more fields", fields, ['{"a":1}', '{"a":1,"b":2}']),
):
    for text in texts:
        shown = text if len(text) < 30 else f"{text.count('1')} items"
        takes = [f"{f.__name__} {f(schema, text)}" for f in (outlines, enforcer, guidance)]
        print(f"{name}, {shown}: {', '.join(takes)}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr") || { tail -5 "$folder/stderr"; exit 1; }
echo "$found"
[[ $found == "1 to 5, 4: outlines True, enforcer True, guidance True
1 to 5, -3: outlines True, enforcer True, guidance False
1 to 5, 500: outlines True, enforcer True, guidance False
0 to 1, 0.5: outlines True, enforcer True, guidance True
0 to 1, -2.5: outlines True, enforcer True, guidance False
multiple of 5, 10: outlines True, enforcer True, guidance True
multiple of 5, 7: outlines True, enforcer True, guidance False
unique, [1,2]: outlines True, enforcer True, guidance error
unique, [1,1]: outlines True, enforcer True, guidance error
any length, 20 items: outlines True, enforcer True, guidance True
any length, 21 items: outlines True, enforcer False, guidance True
more fields, {\"a\":1}: outlines True, enforcer True, guidance True
more fields, {\"a\":1,\"b\":2}: outlines False, enforcer False, guidance True" ]] || {
  echo "this has changed"
  exit 1
}
