"""What the files beside a tokenizer.json say of its special tokens, in the order in which transformers 5.24 takes it.

docs/guide.md ("What a folder's files mean") is the table. Old folders have GPT-2's vocab.json and merges.txt instead.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxlm.data.files import reading
from jaxlm.errors import UserError, one_line

ROLES = ("bos", "eos", "pad")
OWN, LEGACY, CONFIG, GENERATION = (
    "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"
)  # fmt: skip
TEMPLATE, VOCABULARY, MERGES, ADDED = "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json"
FILES = ("tokenizer.json", OWN, LEGACY, CONFIG, GENERATION, TEMPLATE, VOCABULARY, MERGES, ADDED)
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_TOKEN = "<|endoftext|>"  # its class begins, ends and pads with this unless a file says otherwise


def read_special_tokens(folder: Path, where: str) -> dict[str, Any]:
    """What the files in `folder` say, as `Tokenizer` takes and writes it; {} where there are none.

    Returns:
      `bos_token`, `eos_token` and `pad_token` (text), `chat_template`, and the keys of config.json and
      generation_config.json that `Tokenizer` and an export need, as "config" and "generation_config".

    Raises:
      UserError: a file is unreadable; `where` begins it.
    """
    own, config = _tokenizer_settings(folder, where), _read(folder / CONFIG, where)
    said = {f"{role}_token": _text(own.get(f"{role}_token")) for role in ROLES}
    said |= {"chat_template": own.get("chat_template")}
    if os.path.isfile(folder / TEMPLATE):
        said["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    keys = [f"{role}_token_id" for role in ROLES]
    said["config"] = {key: config[key] for key in keys if config.get(key) is not None} or own.get("config")
    generation = _read(folder / GENERATION, where)
    kept = {key: x for key, x in generation.items() if key[0] != "_" and key != "transformers_version"}
    said["generation_config"] = kept or own.get("generation_config")
    return {key: x for key, x in said.items() if x}


def ids_of(said: Mapping[str, Any], role: str) -> list[int]:
    """The ids of a role in generation_config.json, or else in config.json, each a number or a list of them."""
    for section in ("generation_config", "config"):
        value = said.get(section, {}).get(f"{role}_token_id")
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def from_vocabulary(folder: Path, where: str) -> tokenizers.Tokenizer | None:
    """GPT-2's tokenizer of vocab.json and merges.txt; None where these are missing, or of another class.

    Raises:
      UserError: a file is unreadable; `where` begins it. Exception: vocab.json or merges.txt is.
    """
    own, kind = _tokenizer_settings(folder, where), _read(folder / CONFIG, where).get("model_type", "gpt2")
    is_gpt2 = own["tokenizer_class"] in GPT2_CLASSES if "tokenizer_class" in own else kind == "gpt2"
    if not is_gpt2 or not all(os.path.isfile(folder / name) for name in (VOCABULARY, MERGES)):
        return None
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(own.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    special = [_text(own.get(f"{role}_token")) for role in (*ROLES, "unk")]
    special += [GPT2_TOKEN, *map(_text, own.get("additional_special_tokens", []))]
    added = _read(folder / ADDED, where)
    for token in sorted(added, key=added.__getitem__):
        backend.add_tokens([tokenizers.AddedToken(token, special=token in special, normalized=False)])
        if backend.token_to_id(token) != added[token]:
            raise UserError(f"{where}: {ADDED} gives {token} the id {added[token]}, which is not the next one")
    backend.add_special_tokens([token for token in special if token and backend.token_to_id(token) is not None])
    return backend


def _tokenizer_settings(folder: Path, where: str) -> dict[str, Any]:
    """tokenizer_config.json; the older special_tokens_map.json wins, unless the former lists all added tokens."""
    own = _read(folder / OWN, where)
    return own if "added_tokens_decoder" in own else own | _read(folder / LEGACY, where)


def _read(file: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    if not os.path.isfile(file):
        return {}
    with reading(where):
        text = file.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file.name} is not readable: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {file.name} is not readable: it holds no object")
    return value


def _text(token: Any) -> Any:
    """A token's text, which may be in an object with its settings."""
    return token.get("content") if isinstance(token, dict) else token
