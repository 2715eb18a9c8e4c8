"""Conversations as text, by a chat template in Jinja, with the parts of the text that are answers.

A template gets what transformers 5.24 gives it (`messages`, `tools`, `add_generation_prompt`, the special tokens'
names, `raise_exception`, `tojson`), in Jinja's sandbox. A part that it marks with {% generation %} is an answer.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.errors import UserError, one_line

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters of a text, [start, end)

ROLES = ("system", "developer", "user", "assistant", "tool")
CALLS = ("tool_calls", "function_call")
START, END = "\ufdd0", "\ufdd1"  # stand in the template's text around an answer; they are no characters
# Rows that are made today and tomorrow have to be the same, so a template that asks for the date gets this one.
DATE = datetime.datetime(2024, 7, 26)
# What templates raise beside Jinja's own errors: they meet content of any type.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

# For a new model: <bos>, and each turn as a line with its role, its content and <eos>.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content is not string %}{{ raise_exception('it writes nothing but text') }}{% endif %}"
    "<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Rendered(NamedTuple):
    """A conversation's text, and its answers, where the template marks them."""

    text: str
    answers: tuple[Span, ...]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: its output, between START and END."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as in the class that it is of

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (START, END))
        return nodes.Scope([start, *body, end]).set_lineno(line)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _calls(messages: Sequence[Message]) -> list[tuple[int, str]]:
    """Where functions are called: the turn, from 1, and the key."""
    return [(number, key) for number, message in enumerate(messages, 1) for key in CALLS if message.get(key)]


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False} | options)


class ChatTemplate:
    """A chat template.

    Args:
      source: in Jinja.
      tokens: names of special tokens that it may write, such as {"bos_token": "<s>"}.
      where: begins messages.

    Raises:
      UserError: it is no Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        self.source, self.tokens, self.where = source, dict(tokens), where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": DATE.strftime}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{where}: line {getattr(error, 'lineno', '?')}: {one_line(error)}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Changes with what it writes."""
        return hashlib.sha256(json.dumps([self.source, self.tokens], sort_keys=True).encode()).hexdigest()

    @cached_property
    def marks_answers(self) -> bool:
        """Whether it has {% generation %}."""
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.source))

    def render(self, messages: Sequence[Message], prompt: bool = False, tools: Any = None) -> Rendered:
        """The text of a conversation; with `prompt` it ends where the assistant begins to speak.

        Raises:
          UserError: the template raises, or leaves out a turn's tool_calls; the message has no place.
        """
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            marked = self._template.render(**values, **self.tokens)
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{self.where} raises: {one_line(error)}") from error
        text, starts, ends = "", [], []
        for part in re.split(f"([{START}{END}])", marked):
            if part == START:
                starts.append(len(text))
            elif part == END:
                ends.append(len(text))
            else:
                text += part
        if len(starts) != len(ends):
            raise UserError(f"{self.where}: the conversation holds U+FDD0 or U+FDD1, which stand for no character")
        if (calls := _calls(messages)) and self._writes_alike(values, marked):
            number, key = calls[0]
            raise UserError(f"{self.where} does not write {key}, as in turn {number}; name another template")
        return Rendered(text, tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end))

    def _writes_alike(self, values: Mapping[str, Any], marked: str) -> bool:
        """Whether `values` give the text `marked` without their calls, too."""
        without = [{key: x for key, x in turn.items() if key not in CALLS} for turn in values["messages"]]
        try:
            return self._template.render(**{**values, "messages": without}, **self.tokens) == marked
        except TEMPLATE_ERRORS:
            return False

    def answers(self, messages: Sequence[Message], last_only: bool, tools: Any = None) -> Rendered:
        """A conversation with its answers, the assistant's turns; `last_only`: the last of them.

        Where the template doesn't mark them, an answer is what its turn adds to the text up to it.

        Raises:
          UserError: the template raises, or an answer can't be found; the message has no place.
        """
        whole = self.render(messages, tools=tools)
        if self.marks_answers:
            return whole._replace(answers=whole.answers[-1:]) if last_only else whole
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        looked_for = turns[-1:] if last_only else turns
        return whole._replace(answers=tuple(self._turn(messages, turn, whole.text, tools) for turn in looked_for))

    def _turn(self, messages: Sequence[Message], number: int, whole: str, tools: Any) -> Span:
        """Where turn `number` (from 0) stands in the text of all of them."""
        before = self.render(messages[:number], prompt=True, tools=tools).text
        after = whole if number == len(messages) - 1 else self.render(messages[: number + 1], tools=tools).text
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{self.where}: turn {number + 1}, the assistant's, can't be found: the text of the turns up to it is "
                "not where the whole text begins; mark answers with {% generation %}, or set data.loss_on last_turn"
            )
        return len(before), len(after)

    def completion(self, prompt: Sequence[Message], completion: Sequence[Message], tools: Any = None) -> Rendered:
        """A conversation whose answer is all that comes after `prompt`. Raises as `answers`."""
        whole = self.render([*prompt, *completion], tools=tools)
        before = self.render(prompt, prompt=True, tools=tools).text
        if not whole.text.startswith(before):
            raise UserError(f"{self.where}: the text of the prompt is not where the whole text begins")
        return whole._replace(answers=((len(before), len(whole.text)),))


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The turns of a conversation, without keys that hold nothing (tables have each key in each turn).

    Raises:
      UserError: they are none; the message has no place.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("holds no list of messages")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"turn {number} has no role")
        if message["role"] not in ROLES:
            raise UserError(f"turn {number} has an unknown role ({message['role']}); there is: {', '.join(ROLES)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise UserError(f"turn {number} has no content")
        if not isinstance(message.get("content"), str | list | None):
            raise UserError(f"turn {number}: its content is {type(message['content']).__name__}, not text")
        checked.append({key: x for key, x in message.items() if x is not None or key == "content"})
    return checked
