"""The text of a run: tokenized, packed into rows, by index."""

import dataclasses
from collections.abc import Callable

from jaxlm.config import Config, DataConfig
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import TokenDocuments, prepare
from jaxlm.generation.api import encode_prompts
from jaxlm.parallel.processes import say


@dataclasses.dataclass(frozen=True)
class Text:
    """What is trained and evaluated on."""

    tokenizer: Tokenizer
    fingerprint: str  # of the text's content
    rows: Rows
    eval_rows: Rows
    eval_bytes: int  # UTF-8 bytes of the evaluated text


def prepare_text(config: Config, tokenizer: Tokenizer | None) -> Text:
    """Text -> tokenizer -> token arrays -> rows.

    Args:
      tokenizer: that of the run or model that goes on; None: data.tokenizer_path, or one is trained on the text.

    Raises:
      UserError: the text, the tokenizer, the cache folder or training.sample_prompt is not usable.
    """
    data = config.data
    prepared = prepare(data, config.model.vocab_size, tokenizer, say)
    if config.training.sample_tokens:
        prompt, window = config.training.sample_prompt, config.model.max_seq_len
        encode_prompts(prepared.tokenizer, [prompt], window, "training.sample_prompt")
    rows, eval_rows = (rows_of(documents, data, say) for documents in (prepared.train, prepared.validation))
    eval_bytes = prepared.validation.kept_bytes(data.min_length)
    return Text(prepared.tokenizer, prepared.source_fingerprint, rows, eval_rows, eval_bytes)


def rows_of(documents: TokenDocuments, data: DataConfig, report: Callable[[str], None]) -> Rows:
    """The documents, packed as `data` says; UserError if none is left or the cache folder is not usable."""
    plan = plan_cached(documents, data.max_length, data.min_length, data.packing_strategy, data.pack_sequences, report)
    return Rows(documents, plan, data.max_length)
