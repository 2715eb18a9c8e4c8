"""Data sets of the Hugging Face Hub."""

import logging
import os
import re
import threading
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from jaxlm.config import nearest
from jaxlm.data.documents import Found, RowFormat
from jaxlm.data.nested import cleaner
from jaxlm.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets
    import huggingface_hub

# The Hub wants "namespace/name"; these are the bare names that guides use.
NAMES = {
    "wikitext": "Salesforce/wikitext",
    "openwebtext": "Skylion007/openwebtext",
    "tiny_shakespeare": "karpathy/tiny_shakespeare",
    "c4": "allenai/c4",
    "imdb": "stanfordnlp/imdb",
}
WAY_OUT = "use --data.train_files with own text, or --data.dataset_name python-stdlib"
SECONDS = 10  # the Hub has to answer a first request within this time


def prepare(name: str, configuration: str | None, where: str) -> tuple[str, "datasets.DatasetBuilder"]:
    """Downloads a data set into the cache of `datasets`, or finds it there; returns a description and the data set.

    From here on `datasets` and `huggingface_hub` log errors only and, if the Hub is out of reach, are offline.

    Args:
      name: on the Hub, or one of `NAMES`.
      configuration: of the data set; None: its only one.
      where: begins the messages of errors.

    Raises:
      UserError: there is no such data set, or it is not in the cache and the Hub is out of reach.
    """
    if name and os.path.exists(name) and name not in NAMES:
        raise UserError(f"{where} is a local path; use data.train_files for own text")
    name = NAMES.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = nearest(name, [*NAMES, "python-stdlib"])
        raise UserError(f"{where} is not a Hub name of the form namespace/name{hint}; {WAY_OUT}")
    reason = why_unreachable(lambda hub: hub.dataset_info(name, timeout=SECONDS))
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)  # an error is one line, ours
    if reason:  # an earlier download can still be used; offline, the library looks there at once
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        builder = datasets.load_dataset_builder(name, configuration)
        builder.download_and_prepare()
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{where} is not on the Hub, or is not public; {WAY_OUT}") from error
    except ValueError as error:
        hint = one_line(error).partition(" Example of usage")[0]
        message = f"data.dataset_config ({configuration}) of {name}: {hint}; set it to one that there is"
        raise UserError(message) from error
    except (OSError, HTTPError) as error:
        message = f"{where}: the Hugging Face Hub is out of reach ({reason or one_line(error)}); {WAY_OUT}"
        raise UserError(message) from error
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"{where} cannot be loaded: {one_line(error)}") from error
    offline = f" (downloaded before; the Hub is out of reach: {reason})" if reason else ""
    return f"{name} {configuration or ''}".rstrip() + offline, builder


def why_unreachable(request: Callable[["huggingface_hub.HfApi"], object]) -> str | None:
    """Why the Hub does not answer `request` in time; None if it does. The library alone would retry for minutes."""
    reason: str | None = f"no answer within {2 * SECONDS} s"

    def ask() -> None:
        nonlocal reason
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

        try:
            request(HfApi())
            reason = None
        except RepositoryNotFoundError:
            reason = None  # the Hub is there; loading reports the missing data set
        except HfHubHTTPError as error:
            reason = f"HTTP status {error.response.status_code}"
        except (OSError, HTTPError) as error:
            reason = one_line(error)
        except (ValueError, KeyError, TypeError):
            reason = "what answers is not the Hub"  # no JSON, or without its keys: a hotel's sign-in page

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is silent cannot be timed out otherwise
    thread.start()
    thread.join(2 * SECONDS)
    return reason


def load_split(builder: "datasets.DatasetBuilder", split: str, field: str) -> "datasets.Dataset":
    """A split; UserError, naming the option `field`, if there is none."""
    try:
        return builder.as_dataset(split=split)
    except ValueError as error:
        hint = "; none: hold out data.validation_fraction" if field == "data.validation_split" else ""
        raise UserError(f"{field} ({split}): {one_line(error).rstrip('.')}{hint}") from error


def first_row(dataset: "datasets.Dataset", columns: list[str]) -> dict[str, Any]:
    """What the first row holds in some columns; without the others, which may be costly to decode."""
    row: dict[str, Any] = next(iter(dataset.select_columns(columns)), {}) if columns else {}
    return row


def read_split(dataset: "datasets.Dataset", split: str, format_: RowFormat, where: str) -> Found:
    """The documents of a split; `where` begins their places. Raises UserError where a column is missing."""
    columns = format_.columns(dataset.column_names, f"split {split}")
    clean = [cleaner(dataset.features.arrow_schema.field(column).type) for column in columns]
    batches = dataset.select_columns(columns).iter(batch_size=1024)
    rows = chain.from_iterable(zip(*(batch[column] for column in columns), strict=True) for batch in batches)
    for number, values in enumerate(rows, 1):
        row = {column: cleaned(x) for column, cleaned, x in zip(columns, clean, values, strict=True)}
        yield format_.document(row, f"{where}: row {number}")
