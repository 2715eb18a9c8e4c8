"""The text of a run: tokenized, packed into rows, by index."""

import dataclasses
from collections.abc import Iterator

from jaxlm.config import Config
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import prepare
from jaxlm.generation.api import encode_prompts
from jaxlm.parallel.processes import say


@dataclasses.dataclass(frozen=True)
class Text:
    """What is trained and evaluated on; no `eval_rows` where nothing is held out."""

    tokenizer: Tokenizer
    fingerprint: str  # of the text's content
    rows: Rows
    eval_rows: Rows | None
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
    train, held_out = prepared.train, prepared.validation
    if train is None:
        raise ValueError("only evaluation has no training text")
    rows = Rows(train, plan_cached(train, data, say))
    for line in untrained_positions(config, rows.plan.longest, config.model.max_seq_len):
        say(line)
    eval_rows = None if held_out is None else Rows(held_out, plan_cached(held_out, data, say))
    eval_bytes = 0 if held_out is None else held_out.kept_bytes(data.min_length)
    return Text(prepared.tokenizer, prepared.source_fingerprint, rows, eval_rows, eval_bytes)


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
