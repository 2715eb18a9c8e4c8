"""What a row says: a text, a conversation, a prompt with its completion, or the ids of its tokens."""

import json
from collections.abc import Collection, Mapping
from itertools import takewhile
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, nearest
from jaxlm.data.chat import ChatTemplate, check_messages
from jaxlm.data.chat_tokens import chat_template
from jaxlm.data.documents import Document, RowFormat
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, one_line

MESSAGES, PROMPT, COMPLETION, TOOLS = "messages", "prompt", "completion", "tools"
INPUT_IDS, NOT_PADDING, LABELS = "input_ids", "attention_mask", "labels"  # as tokenizers of transformers name them


def _missing(kind: str, column: str, names: Collection[str], where: str) -> UserError:
    option = f"data.text_column ({column})" if kind == "text" else f"data.format ({kind}): {column}"
    listed = ", ".join([*names][:20]) + (", ..." if len(names) > 20 else "")
    how = " (data.text_column names the one to read)" if kind == "text" and names else ""
    return UserError(f"{option}: not in {where}{nearest(column, names)}; there is: {listed or 'nothing'}{how}")


def _with_all(kind: str, columns: Collection[str], names: Collection[str], where: str) -> list[str]:
    for column in columns:
        if column not in names:
            raise _missing(kind, column, names, where)
    return [*columns]


class TextRows:
    """A text in the column `column`."""

    kind, fingerprint = "text", ""
    template: ChatTemplate | None = None

    def __init__(self, column: str) -> None:
        self.column = column

    def columns(self, names: Collection[str], where: str) -> list[str]:
        return _with_all(self.kind, [self.column], names, where)

    def document(self, row: Mapping[str, Any], place: str) -> Document | UserError:
        if self.column not in row:
            return _missing(self.kind, self.column, row, place)
        value = row[self.column]
        if not isinstance(value, str):
            return UserError(f"data.text_column ({self.column}): {place} holds {type(value).__name__}, not text")
        return Document(value, place)


class ConversationRows:
    """`messages`, of which the assistant's are answers; or a prompt and a completion, of text or of messages.

    Args:
      loss_on: data.loss_on.
    """

    def __init__(self, kind: str, template: ChatTemplate | None, loss_on: str) -> None:
        self.kind, self.template, self._loss_on = kind, template, loss_on
        self._needed = [MESSAGES] if kind == "messages" else [PROMPT, COMPLETION]
        self.fingerprint = f"{kind} {loss_on} 2"  # the number: of what the same rows give

    def columns(self, names: Collection[str], where: str) -> list[str]:
        return _with_all(self.kind, self._needed, names, where) + [TOOLS] * (TOOLS in names)

    def document(self, row: Mapping[str, Any], place: str) -> Document | UserError:
        for column in self._needed:
            if column not in row:
                return _missing(self.kind, column, row, place)
        try:
            document = self._conversation(row, place)
        except UserError as fault:
            return UserError(f"{place}: {fault}")
        if self._loss_on == "all":
            document = document._replace(learned=None)
        return document

    def _conversation(self, row: Mapping[str, Any], place: str) -> Document:
        values = [row[column] for column in self._needed]
        wanted, called = (str, "text") if self.template is None else (list, "lists of messages")
        if not all(isinstance(value, wanted) for value in values):
            found = ", ".join(f"{column}: {type(row[column]).__name__}" for column in self._needed)
            raise UserError(f"holds {found}; the first row of the text holds {called}")
        if self.template is None:
            prompt, completion = values
            answer = len(prompt), len(prompt + completion)
            return Document(prompt + completion, place, (answer,) if completion else ())
        parts, tools = [check_messages(value) for value in values], _tools(row.get(TOOLS))
        together = [message for messages in parts for message in messages]
        if self._loss_on == "all":
            rendered = self.template.render(together, tools=tools)
        elif self.kind == MESSAGES or self._loss_on == "last_turn":
            rendered = self.template.answers(together, self._loss_on == "last_turn", tools)
        else:
            rendered = self.template.completion(parts[0], parts[1], tools)
        return Document(rendered.text, place, rendered.answers, complete=True)


class TokenRows:
    """The ids of a document's tokens, as they stand, in the column input_ids."""

    kind = fingerprint = "tokens"
    template: ChatTemplate | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def columns(self, names: Collection[str], where: str) -> list[str]:
        others = [column for column in (NOT_PADDING, LABELS) if column in names]
        return _with_all(self.kind, [INPUT_IDS], names, where) + others

    def document(self, row: Mapping[str, Any], place: str) -> Document | UserError:
        if INPUT_IDS not in row:
            return _missing(self.kind, INPUT_IDS, row, place)
        if LABELS in row:
            return UserError(f"{place} has {LABELS} beside {INPUT_IDS}, and all tokens would be learned; drop it")
        try:
            ids = np.asarray(row[INPUT_IDS])
            if NOT_PADDING in row:
                ids = ids[np.asarray(row[NOT_PADDING], bool)]
        except (ValueError, TypeError, IndexError) as error:
            return UserError(f"{place}: {INPUT_IDS}: {one_line(error)}")
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            found = f"{ids.dtype} [{', '.join(map(str, ids.shape))}]"
            return UserError(f"{place} holds {found}, not the token ids of a document (integers [tokens])")
        if len(wrong := ids[(ids < 0) | (ids >= self._tokenizer.vocab_size)]):
            return UserError(f"{place}: id {wrong[0]} is none of the tokenizer's {self._tokenizer.vocab_size:,} tokens")
        return Document(self._tokenizer.decode(ids), place, ids=ids)


def _tools(value: object) -> list[Any] | None:
    """The tools of a row, which may be JSON; UserError: they are no list."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value or None
    except (ValueError, RecursionError) as error:
        raise UserError(f"tools: bad JSON: {one_line(error)}") from error
    if not isinstance(tools, list | None):
        raise UserError(f"tools is {type(tools).__name__}, not a list")
    return tools


def choose_format(
    data: DataConfig,
    first: Mapping[str, Any] | None,
    where: str,
    tokenizer: Tokenizer | None,
    evaluating: bool = False,
) -> RowFormat:
    """What data.format asks for, or, where it is auto, what a text's first row says.

    Args:
      first: the first row; None: it is plain text without rows.
      where: begins messages.
      tokenizer: whose chat template it may be; None: one will be trained.
      evaluating: options of the training need not fit.

    Raises:
      UserError: an option does not fit the text, or there is no chat template.
    """
    kind, names = data.format, {*(first or ())}
    if kind == "auto":
        kind = "text"
        if data.text_column not in names and data.text_column == DataConfig.text_column:
            kind = MESSAGES if MESSAGES in names else "prompt_completion" if {PROMPT, COMPLETION} <= names else kind
            kind = "tokens" if kind == "text" and INPUT_IDS in names else kind
    conversational = kind == MESSAGES or (kind == "prompt_completion" and isinstance((first or {}).get(PROMPT), list))
    # A model that was tuned may be evaluated on any text; of a mixture, `tokens.prepare_all` looks at all sources.
    if not (conversational or evaluating or data.sources):
        for name, value in (("chat_template", data.chat_template), ("loss_on", data.loss_on)):
            if value is not None and value not in ("completions", "all"):
                raise UserError(f"data.{name} ({value}): {where} holds no conversations; leave it out")
    if kind == "text":
        return TextRows(data.text_column)
    if first is None:
        raise UserError(f"data.format ({kind}): {where} is plain text; conversations are rows of .jsonl or .parquet")
    if data.document_separator is not None and not data.sources:
        raise UserError(f"data.document_separator ({data.document_separator}) splits text, not {kind}; unset it")
    if kind == "tokens":
        if tokenizer is None:
            how = "set data.tokenizer_path, or training.init_from"
            raise UserError(f"{where} holds {INPUT_IDS}, ids of a tokenizer that is there; {how}")
        return TokenRows(tokenizer)
    if data.pack_sequences and data.packing_strategy == "concat":
        raise UserError("data.packing_strategy (concat) would cut conversations anywhere; set it to best_fit")
    return ConversationRows(kind, chat_template(data, tokenizer) if conversational else None, data.loss_on)


def columns_that_tell(data: DataConfig) -> tuple[str, ...]:
    """The columns that `choose_format` and `first_question` look for in a first row."""
    return data.text_column, MESSAGES, PROMPT, COMPLETION, INPUT_IDS


def columns_read(data: DataConfig) -> tuple[str, ...]:
    """All columns that a document may be made of."""
    return (*columns_that_tell(data), TOOLS, NOT_PADDING, LABELS)


def first_question(format_: RowFormat, first: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """The messages of the first row that stand before an answer; None where it holds none."""
    if format_.template is None or first is None:
        return None
    try:
        messages = check_messages(first.get(MESSAGES, first.get(PROMPT)))
    except UserError:
        return None
    return [*takewhile(lambda message: message["role"] != "assistant", messages)] or None
