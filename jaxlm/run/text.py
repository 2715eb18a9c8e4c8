"""The text of a run: tokenized, packed into rows, by index."""

import dataclasses
from collections.abc import Iterator, Mapping

from jaxlm.config import Config, DataConfig
from jaxlm.config.mixture import mixture_options
from jaxlm.data.handed_over import HandedOver
from jaxlm.data.loader import Rows
from jaxlm.data.mixture import Mixture, held_out, texts
from jaxlm.data.packing import plan_cached
from jaxlm.data.streaming import StreamedRows
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import Prepared, Report, Streamed, TokenDocuments, prepare_all, reporter
from jaxlm.errors import UserError
from jaxlm.generation.api import Prompt, encode_prompts
from jaxlm.parallel.processes import say


@dataclasses.dataclass(frozen=True)
class Text:
    """What is trained and evaluated on; no `eval_rows` where nothing is held out."""

    tokenizer: Tokenizer
    fingerprint: str  # of the text's content
    rows: Rows | Mixture | StreamedRows
    eval_rows: dict[str, Rows]  # by source, as `held_out` has them
    eval_bytes: int  # UTF-8 bytes of the evaluated text
    sample_prompt: Prompt  # what samples go on from, or answer
    files: list[str]  # SHA-256 of those that are trained on, in hexadecimal

    @property
    def longest_piece(self) -> int:
        """Pairs of the longest piece that is trained on; the most that there may be, where not all is packed yet."""
        if isinstance(self.rows, StreamedRows):
            return self.rows.parts[""].plan.max_length
        return longest_piece(self.rows.parts)


def prepare_text(config: Config, tokenizer: Tokenizer | None, given: HandedOver | None = None) -> Text:
    """Text -> tokenizer -> token arrays -> rows.

    Args:
      tokenizer: that of the run or model that goes on; None: data.tokenizer_path, or one is trained on the text.
      given: the text, where a program hands it over.

    Raises:
      UserError: the text, the tokenizer, the cache folder or training.sample_prompt is not usable.
    """
    data = config.data
    prepared = prepare_all(texts(data), config.model.vocab_size, tokenizer, say, given=given)
    asked = next((each for each in prepared.values() if each.question is not None), next(iter(prepared.values())))
    prompt = _sample_prompt(config, asked) if config.training.sample_tokens else ""
    rows = _rows({name: each.train for name, each in prepared.items()}, data)
    evaluated = held_out(data, prepared)
    eval_bytes = sum(documents.kept_bytes(data.min_length) for documents in evaluated.values())
    fingerprint = ";".join(each.source_fingerprint for each in prepared.values())
    files = sorted(digest.hex() for each in prepared.values() for digest in each.files)
    text = Text(asked.tokenizer, fingerprint, rows, pack_all(evaluated, data, say), eval_bytes, prompt, files)
    for line in untrained_positions(config, text.longest_piece, config.model.max_seq_len):
        say(line)
    return text


def _rows(trained: Mapping[str, TokenDocuments | Streamed | None], data: DataConfig) -> Rows | Mixture | StreamedRows:
    """The rows to train on, of one text or of several."""
    if isinstance(streamed := trained.get(""), Streamed):
        return StreamedRows(streamed, data, say)
    rows = pack_all({name: each for name, each in trained.items() if isinstance(each, TokenDocuments)}, data, say)
    return Mixture(rows, mixture_options(data).weights) if data.sources else rows[""]


def pack_all(documents: Mapping[str, TokenDocuments], data: DataConfig, report: Report) -> dict[str, Rows]:
    """The rows of each source; with a `loss_mask` in all where one has it."""
    masked = any(each.learned is not None for each in documents.values())
    plans = {name: plan_cached(each, data, reporter(report, name)) for name, each in documents.items()}
    return {name: Rows(each, plans[name], masked) for name, each in documents.items()}


def longest_piece(parts: Mapping[str, Rows]) -> int:
    """Pairs of the longest piece of any source."""
    return max(rows.plan.longest for rows in parts.values())


def _sample_prompt(config: Config, prepared: Prepared) -> Prompt:
    """training.sample_prompt; where conversations are learned it is a question, and without it the data's first one.

    Raises:
      UserError: training.sample_prompt is not usable.
    """
    tokenizer, window, asked = prepared.tokenizer, config.model.max_seq_len, config.training.sample_prompt
    if prepared.question is not None and not asked:
        try:
            encode_prompts(tokenizer, [prepared.question], window)
            return prepared.question
        except UserError:  # it is too long to be answered, or the template wants more
            return ""
    prompt: Prompt = asked if prepared.question is None else [{"role": "user", "content": asked}]
    encode_prompts(tokenizer, [prompt], window, "training.sample_prompt")
    return prompt


def describe_sample(prompt: Prompt, text: str) -> str:
    """A sample as it is shown: `text` has its prompt in it; of a conversation it is the answer."""
    if isinstance(prompt, str):
        return text
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in [*prompt, {"role": "assistant", "content": text}])


def untrained_positions(config: Config, trained: int, wanted: int) -> Iterator[str]:
    """A line if a run whose longest piece has `trained` tokens left some of the positions below `wanted` untrained.

    Only learned positions have to be trained; those of init_from's model were, elsewhere.
    """
    model, by = config.model, f"the longest piece of a document that was trained on has {trained} tokens"
    if model.positions == "learned" and config.training.init_from is None and trained < wanted:
        yield (
            f"model.max_seq_len ({model.max_seq_len}): positions {trained} to {wanted - 1} are never trained, as {by} "
            f"(data.max_length {config.data.max_length}); text beyond them is noise"
        )
