"""The text of a run: tokenized, packed into rows, by index."""

import dataclasses

from jaxlm.config import Config
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import prepare
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
    rows = Rows(prepared.train, plan_cached(prepared.train, data, say))
    eval_rows = Rows(prepared.validation, plan_cached(prepared.validation, data, say))
    eval_bytes = prepared.validation.kept_bytes(data.min_length)
    return Text(prepared.tokenizer, prepared.source_fingerprint, rows, eval_rows, eval_bytes)
