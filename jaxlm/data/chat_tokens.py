"""The chat template of a tokenizer: its folder's, one that is named, or a plain one for a new model."""

import os
from pathlib import Path

from jaxlm.config import DataConfig
from jaxlm.data.chat import PLAIN, ChatTemplate
from jaxlm.data.files import reading
from jaxlm.data.special_tokens import ROLES
from jaxlm.data.tokenizer import BOS, EOS, PAD, Tokenizer
from jaxlm.errors import UserError

NEW = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}  # of a tokenizer that is trained here
ANSWER = "forty-two"  # in a conversation by which a template shows what it puts behind an answer
PROBE = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": ANSWER}]


def chat_template(data: DataConfig, tokenizer: Tokenizer | None) -> ChatTemplate:
    """The template for conversations: data.chat_template's, or else the tokenizer's.

    Args:
      tokenizer: None: one will be trained on the text.

    Raises:
      UserError: there is none, or it is no Jinja.
    """
    named = data.chat_template
    if named == "plain" or (named is None and tokenizer is None):
        names = NEW if tokenizer is None else _names(tokenizer)
        return ChatTemplate(PLAIN, names, "data.chat_template (plain)")
    said = NEW if tokenizer is None else tokenizer.said
    names = {name: said[name] for name in NEW if name in said}
    if named is not None:
        where, path = f"data.chat_template ({named})", Path(named).expanduser()
        if not os.path.isfile(path):
            raise UserError(f"{where}: no such file; name one of Jinja, or plain")
        with reading(where):
            return ChatTemplate(path.read_text(encoding="utf-8"), names, where)
    source = _default(said.get("chat_template"))
    if source is None:
        how = "name a file of one, or plain (chatting: --chat_template)"
        raise UserError(f"data.chat_template (none): the tokenizer has no chat template; {how}")
    return ChatTemplate(source, names, "the tokenizer's chat template")


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's own template, as `chat_template`."""
    return chat_template(DataConfig(), tokenizer)


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    return {f"{role}_token": tokenizer.token(getattr(tokenizer, f"{role}_id")) for role in ROLES}


def _default(said: object) -> str | None:
    """The template of a folder, which may list several with names."""
    if isinstance(said, list):
        by_name = {entry["name"]: entry["template"] for entry in said if {"name", "template"} <= set(entry)}
        said = by_name.get("default", next(iter(by_name.values()), None))
    return said if isinstance(said, str) else None


def with_template(tokenizer: Tokenizer, template: ChatTemplate) -> Tokenizer:
    """The tokenizer with the chat template that its model has learned, the token that ends an answer among its ends."""
    tokenizer = tokenizer.saying({"chat_template": template.source} | template.tokens)
    end = turn_end(template, tokenizer)
    if end is None or end in tokenizer.end_ids:
        return tokenizer
    generation = dict(tokenizer.said.get("generation_config") or {}) | {"eos_token_id": [*tokenizer.end_ids, end]}
    return tokenizer.saying({"generation_config": generation})


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The first special token after an answer's text; None: there is none, or the template wants other turns."""
    try:
        text = template.render(PROBE).text
    except UserError:
        return None
    _, answered, behind = text.rpartition(ANSWER)
    found = tokenizer.encode(behind) if answered else []
    return next((token for token in found if tokenizer.token(token) in tokenizer.special_in_text), None)


def why_it_will_not_stop(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """A line where what the template marks as an answer leaves out the token that ends it; None: all is well."""
    end = turn_end(template, tokenizer)
    if end is None or not template.marks_answers:
        return None
    text, answers = template.render(PROBE)
    if answers and tokenizer.token(end) in text[answers[-1][0] : answers[-1][1]]:
        return None
    token = tokenizer.token(end)
    return f"{template.where}: {token} ends an answer and is not in {{% generation %}}: the model won't learn to stop"
