"""What a saved folder holds beside arrays, and reading it.

Every saved folder holds the same items: `params` (Orbax), `config/config.json`, `tokenizer/tokenizer.json` and
`progress/progress.json`; a checkpoint also holds `optimizer` (Orbax).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.config import Config, DataConfig, from_dict, to_dict, with_derived
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

T = TypeVar("T")

JSON_ITEMS = {"config": "config.json", "tokenizer": "tokenizer.json", "progress": "progress.json"}


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a resumed run has to know beside arrays."""

    step: int  # optimizer updates done
    total_steps: int
    best_loss: float | None  # lowest validation loss so far, nats a token
    requested_vocab_size: int  # what the BPE was asked for; config.json has what it reached
    data_fingerprint: str
    global_batch: int  # rows an update
    shards: int  # devices that arrays were sharded over: an axis that it does not divide was saved padded with zeros
    model_class: str = "Transformer"  # folders from before there were others don't say
    loss: str | None = None  # name of an own one
    longest_piece: int | None = None  # tokens that a document had in a row, at most; older folders don't say
    rows_taken: int | None = None  # rows of the stream that its updates took; folders from before global_batch could
    # change don't say
    anneal_row: int | None = None  # of the stream, from which on data.anneal_weights hold
    evaluations_since_best: int = 0  # without a lower validation loss
    files: Sequence[str] = ()  # SHA-256 of those that it was trained on, in hexadecimal; older folders don't say

    @property
    def position(self) -> int:
        """Where in the stream of rows the run is."""
        return self.step * self.global_batch if self.rows_taken is None else self.rows_taken


def write_json_items(folder: Path, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes the items of a saved folder that are no arrays."""
    contents = {"config": to_dict(config), "progress": dataclasses.asdict(progress)}
    texts = {f"{item}/{JSON_ITEMS[item]}": json.dumps(content) for item, content in contents.items()}
    for name, text in (texts | {f"tokenizer/{name}": text for name, text in tokenizer.files().items()}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _read_json(path: Path, item: str, build: Callable[[Any], T]) -> T:
    file = path / item / JSON_ITEMS[item]
    try:
        return build(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not readable ({error}); it is of another version: name another") from error


def read_progress(path: Path) -> Progress:
    """The progress saved in a checkpoint or model folder; UserError if it can't be read."""
    return _read_json(path, "progress", lambda values: Progress(**values))


def read_config(path: Path) -> Config:
    """The resolved configuration saved in a checkpoint or model folder; UserError if it can't be read."""
    return _read_json(path, "config", lambda values: with_derived(from_dict(values, str(path))))


def read_tokenizer(path: Path, data: DataConfig | None = None) -> Tokenizer:
    """The tokenizer saved in a checkpoint or model folder, `data` as in `Tokenizer.find`; UserError if unreadable."""
    return Tokenizer.load(path / "tokenizer", str(path), data)
