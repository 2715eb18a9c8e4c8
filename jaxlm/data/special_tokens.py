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
OWN, LEGACY = "tokenizer_config.json", "special_tokens_map.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
TEMPLATE, VOCABULARY, MERGES, ADDED = "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json"
FILES = ("tokenizer.json", OWN, LEGACY, CONFIG, GENERATION, TEMPLATE, VOCABULARY, MERGES, ADDED)


def read_special_tokens(folder: Path, where: str) -> dict[str, Any]:
    """What is said in `folder`: `bos_token`, `eos_token` and `pad_token` (text), `chat_template`, `generation_config`,
    and as `config` the ids in config.json. UserError, which `where` begins: a file is unreadable.
    """
    own, config, generation = _own(folder, where), *(read_object(folder / name, where) for name in (CONFIG, GENERATION))
    said: dict[str, Any] = {f"{role}_token": _text(own.get(f"{role}_token")) for role in ROLES}
    if os.path.isfile(folder / TEMPLATE):
        with reading(where):
            own["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    ids = {key: x for key, x in config.items() if key in {f"{role}_token_id" for role in ROLES}}
    generation = {key: x for key, x in generation.items() if key[0] != "_" and key != "transformers_version"}
    said |= {"config": ids or own.get("config"), "generation_config": generation or own.get("generation_config")}
    return {key: x for key, x in (said | {"chat_template": own.get("chat_template")}).items() if x}


def ids_of(said: Mapping[str, Any], role: str) -> list[int]:
    """The ids of a role in generation_config.json, or else in config.json, each a number or a list of them."""
    values = (said.get(section, {}).get(f"{role}_token_id") for section in ("generation_config", "config"))
    value: Any = next((value for value in values if value is not None), [])
    return [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]


def from_vocabulary(folder: Path, where: str) -> tokenizers.Tokenizer | None:
    """GPT-2's tokenizer of vocab.json and merges.txt; None where these are missing, or of another class.

    Raises:
      UserError: a file is unreadable; `where` begins it. Exception: vocab.json or merges.txt is.
    """
    own, model_type = _own(folder, where), read_object(folder / CONFIG, where).get("model_type") or "gpt2"
    kind = str(own.get("tokenizer_class") or f"{str(model_type).upper()}Tokenizer").removesuffix("Fast")
    if kind != "GPT2Tokenizer" or not all(os.path.isfile(folder / name) for name in (VOCABULARY, MERGES)):
        return None
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(own.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    added = read_object(folder / ADDED, where)
    backend.add_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in sorted(added, key=added.__getitem__)]
    )
    if wrong := [token for token, number in added.items() if backend.token_to_id(token) != number]:
        raise UserError(f"{where}: {ADDED} gives {wrong[0]} the id {added[wrong[0]]}, which is not the next one")
    listed = own.get("additional_special_tokens") or []
    special = ["<|endoftext|>", *(_text(x) for x in [*listed, *(own.get(f"{role}_token") for role in (*ROLES, "unk"))])]
    backend.add_special_tokens([token for token in special if token and backend.token_to_id(token) is not None])
    return backend


def read_object(file: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none; UserError, which `where` begins: it is unreadable."""
    if not os.path.isfile(file):
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file.name} is not readable: {one_line(error)}") from error
    return value


def _own(folder: Path, where: str) -> dict[str, Any]:
    """tokenizer_config.json; the older special_tokens_map.json wins, unless the former lists all added tokens."""
    own = read_object(folder / OWN, where)
    return own if "added_tokens_decoder" in own else own | read_object(folder / LEGACY, where)


def _text(token: object) -> str | None:
    """A token's text, which may be in an object with its settings."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
