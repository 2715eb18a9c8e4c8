"""The text of a run: tokenized, packed into rows, by index."""

import dataclasses
from collections.abc import Iterator

from jaxlm.config import Config
from jaxlm.data.handed_over import HandedOver
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import Prepared, prepare
from jaxlm.errors import UserError
from jaxlm.generation.api import Prompt, encode_prompts
from jaxlm.parallel.processes import say


@dataclasses.dataclass(frozen=True)
class Text:
    """What is trained and evaluated on; no `eval_rows` where nothing is held out."""

    tokenizer: Tokenizer
    fingerprint: str  # of the text's content
    rows: Rows
    eval_rows: Rows | None
    eval_bytes: int  # UTF-8 bytes of the evaluated text
    sample_prompt: Prompt  # what samples go on from, or answer


def prepare_text(config: Config, tokenizer: Tokenizer | None, given: HandedOver | None = None) -> Text:
    """Text -> tokenizer -> token arrays -> rows.

    Args:
      tokenizer: that of the run or model that goes on; None: data.tokenizer_path, or one is trained on the text.
      given: the text, where a program hands it over.

    Raises:
      UserError: the text, the tokenizer, the cache folder or training.sample_prompt is not usable.
    """
    data = config.data
    prepared = prepare(data, config.model.vocab_size, tokenizer, say, given=given)
    prompt = _sample_prompt(config, prepared) if config.training.sample_tokens else ""
    train, held_out = prepared.train, prepared.validation
    if train is None:
        raise ValueError("only evaluation has no training text")
    rows = Rows(train, plan_cached(train, data, say))
    for line in untrained_positions(config, rows.plan.longest, config.model.max_seq_len):
        say(line)
    eval_rows = None if held_out is None else Rows(held_out, plan_cached(held_out, data, say))
    eval_bytes = 0 if held_out is None else held_out.kept_bytes(data.min_length)
    return Text(prepared.tokenizer, prepared.source_fingerprint, rows, eval_rows, eval_bytes, prompt)


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
