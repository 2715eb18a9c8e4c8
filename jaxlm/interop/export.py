"""A saved model as a folder that `transformers` opens: AutoModelForCausalLM and AutoTokenizer, without code of ours.

config.json, generation_config.json        the model's class and shapes; its special tokens
model.safetensors                          the parameters; or several files, with model.safetensors.index.json
tokenizer.json, tokenizer_config.json      the same ids as here, with <bos> before a text as here
README.md                                  the model card: what it was trained on, how, and how well it does
"""

import json
import math
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing

import jaxlm
from jaxlm.checkpoints.items import Progress
from jaxlm.checkpoints.load import LoadedModel
from jaxlm.checkpoints.manifest import model_in
from jaxlm.checkpoints.save import reason_of
from jaxlm.config import Config, replace_fields, to_dict
from jaxlm.config.schema import PYTHON, STDLIB
from jaxlm.data.atomic import atomic_path
from jaxlm.data.special_tokens import ROLES
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop.families import family_for, to_config, to_tensors
from jaxlm.interop.peft import CONFIG as ADAPTER_CONFIG
from jaxlm.interop.peft import write_adapter
from jaxlm.interop.pretrained import HUB_NAME
from jaxlm.report.runs import read_run
from jaxlm.train.trainable import alpha, merged

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# These have no part in the training, and may say more of a machine than a model card should.
PRIVATE = ("checkpoint_dir", "cache_dir", "resume_from_checkpoint", "stop_at_step", "wandb_project")


def check_target(path: Path) -> None:
    """Raises UserError unless a folder can be made at `path`: there is none, or an empty one."""
    if os.path.isdir(path):
        if os.listdir(path):
            raise UserError(f"--to ({path}): is not empty; name another folder, or delete it")
    elif os.path.lexists(path):
        raise UserError(f"--to ({path}): is no folder; name another")


def export(loaded: LoadedModel, source: Path, to: Path, *, max_shard_size: int, dtype: str, **card: Any) -> str:
    """Writes the folder `to`, whole or not at all.

    Args:
      loaded: the model, from `load(source)`.
      source: its folder; the run's metrics are looked for beside it.
      to: a new folder, or an empty one.
      max_shard_size: bytes of a safetensors file; a larger tensor has one of its own.
      dtype: of the parameters there, one of DTYPES.
      card: what the model card says to the Hub: `repo_id`, `license` and `language` (a list).

    Returns:
      The class of transformers that opens it.

    Raises:
      UserError: transformers has no such model, or `to` can't be written.
    """
    family = family_for(loaded.config.model, f"--model ({source})")
    check_target(to)
    to = Path(os.path.abspath(to))
    params = flatten_dict(merged(nnx.to_pure_dict(nnx.state(loaded.model)), loaded.config.training), sep="/")
    tensors = dict(to_tensors({path: np.asarray(x) for path, x in params.items()}, family, loaded.config.model.n_heads))
    said, ends = loaded.tokenizer.said, list(loaded.tokenizer.end_ids)
    ids = {f"{role}_token_id": getattr(loaded.tokenizer, f"{role}_id") for role in ROLES}
    several = ids | {"eos_token_id": ends} if len(ends) > 1 else ids
    of_config = several if isinstance(said.get("config", {}).get("eos_token_id"), list) else ids
    texts = {
        "config.json": _json({**to_config(loaded.config.model, family), **of_config, "dtype": dtype}),
        "generation_config.json": _json(said.get("generation_config", {}) | several),
        "README.md": _model_card(loaded, source, family.architecture, {"repo_id": to.name} | card),
        **_tokenizer_files(loaded.tokenizer, loaded.config.model.max_seq_len),
    }
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(to) as folder:
            folder.mkdir()
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            _write_tensors(folder, tensors, max_shard_size, dtype)
            for path in folder.iterdir():
                path.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read its files
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to ({to}): cannot be written ({reason_of(error)}); name another folder") from error
    return family.architecture


def export_adapter(loaded: LoadedModel, source: Path, to: Path) -> None:
    """Writes the adapters alone, as PEFT has them, into the folder `to`, whole or not at all.

    Raises:
      UserError: the model has none, its base is none of transformers', or `to` can't be written.
    """
    training, base = loaded.config.training, loaded.config.training.init_from
    if training.lora_rank is None or base is None:
        raise UserError(f"--adapter: the model of --model ({source}) was trained without adapters; leave it out")
    own = Path(base).expanduser()
    if os.path.isdir(model_in(own) / "params") or os.path.isfile(own / ADAPTER_CONFIG):
        raise UserError(
            f"--adapter: its base ({base}) is no model of transformers; leave it out, and the two are merged"
        )
    family = family_for(loaded.config.model, f"--model ({source})")
    base = os.path.abspath(own) if own.is_dir() else base  # else it is a name on the Hub
    check_target(to)
    params = {
        path: np.asarray(x) for path, x in flatten_dict(nnx.to_pure_dict(nnx.state(loaded.model)), sep="/").items()
    }
    texts = _tokenizer_files(loaded.tokenizer, loaded.config.model.max_seq_len)
    numbers: dict[str, Any] = {"rank": training.lora_rank, "alpha": alpha(training), "dropout": training.lora_dropout}
    numbers["heads"] = loaded.config.model.n_heads
    try:
        write_adapter(params, family, Path(os.path.abspath(to)), base, texts, **numbers)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to ({to}): cannot be written ({reason_of(error)}); name another folder") from error


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_size: int, dtype: str) -> None:
    """Writes the safetensors files, and their index if there are several; only one file at a time is in memory."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    kind = np.dtype(DTYPES[dtype])
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda x: x.size * kind.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: _cast(tensors[name], kind) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8")


def _cast(x: np.ndarray, kind: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(x, dtype=kind)
    if kind == np.float16 and np.isinf(cast).any() and np.isfinite(x).all():
        raise UserError("--dtype (float16) is too small for this model's parameters; use bfloat16 or float32")
    return cast


def _tokenizer_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, str]:
    """{file name: text}. AutoTokenizer then gives a text the same ids as ours, even if "<bos>" is written out in it,
    unless there is a chat template, or the model is a Qwen2 (`_tokenizer_class`).

    As `generate_text` does, it begins a text with <bos>, unless add_special_tokens=False.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bos = tokenizer.token(tokenizer.bos_id)
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    unknown: dict[str, Any] = {"unk_token": tokenizer.token(tokenizer.eos_id)}  # as GPT-2 has it; CTranslate2 needs one
    settings = unknown | {key: x for key, x in tokenizer.settings().items() if isinstance(x, str | list)}
    settings |= {
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids unless told
        "split_special_tokens": not tokenizer.special_in_text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    return {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": _json(settings)}


def _tokenizer_class(architecture: str) -> str:
    """What opens the tokenizer in transformers: findings/qwen2-folders-get-qwens-tokenizer.sh."""
    return "PreTrainedTokenizerFast" if architecture == "Qwen2ForCausalLM" else "AutoTokenizer"


def _metadata(config: Config, card: Mapping[str, Any]) -> str:
    """The YAML at the head of the card; license and language, if not given, are those of the model it started from."""
    from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

    base, data = config.training.init_from or "", config.data
    is_on_hub = bool(HUB_NAME.fullmatch(base)) and not os.path.isdir(base)
    file: Any = try_to_load_from_cache(base, "README.md") if is_on_hub else os.path.expanduser(f"{base}/README.md")
    is_there = base != "" and isinstance(file, str) and os.path.isfile(file)
    known = ModelCard.load(file, ignore_metadata_errors=True).data if is_there else ModelCardData()
    own_text = data.train_files or data.sources or data.dataset_name in (STDLIB, PYTHON)
    return ModelCardData(
        language=card.get("language") or known.language,
        license=card.get("license") or known.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_on_hub else None,
        datasets=None if own_text else [data.dataset_name],
        metrics=["perplexity"],
        tags=["jaxlm"],
    ).to_yaml()


def _model_card(loaded: LoadedModel, source: Path, architecture: str, card: Mapping[str, Any]) -> str:
    """The text of README.md, for the class `architecture` of transformers.

    `source` is the model's own folder; the run's metrics are looked for beside it.
    """
    progress, config, source = loaded.progress, loaded.config, source.resolve()
    if progress is None:
        raise UserError(f"--model ({source}): is for transformers already; name a model of jaxlm's")
    data, tokens = config.data, config.data.max_length * progress.global_batch
    first = " at first" if config.training.batch_schedule else ""
    data_set = " ".join(filter(None, (data.dataset_name, data.dataset_config, data.dataset_split)))
    if data.dataset_name in (STDLIB, PYTHON):
        data_set = data.dataset_name
    table = {
        "parameters": f"{sum(x.size for x in jax.tree.leaves(nnx.state(loaded.model))):,}",
        "training text": ", ".join(data.train_files or data.sources) or data_set,
        "SHA-256 of the text": progress.data_fingerprint,
        "started from": config.training.init_from or "random parameters",
        "updates": f"{progress.step:,} of {progress.total_steps:,}",
        "tokens": f"{progress.position * data.max_length:,}, in updates of {tokens:,}{first} (padding included)",
        **_scores(source.parent, progress),
    }
    template = files("jaxlm.interop").joinpath("model_card.md").read_text(encoding="utf-8")
    return template.format(
        name=f"{source.parent.name}/{source.name}",
        head=_metadata(config, card),
        repo=card["repo_id"],
        special="such tokens" if loaded.tokenizer.special_in_text else "plain characters",
        version=jaxlm.__version__,
        architecture=architecture,
        tokenizer=_tokenizer_class(architecture),
        prompt=json.dumps(config.training.sample_prompt or "The")[1:-1],
        bos=loaded.tokenizer.token(loaded.tokenizer.bos_id),
        rows="\n".join(f"| {name} | {value} |" for name, value in table.items()),
        config=json.dumps(_changed_options(config, progress), indent=2),
    )


def _scores(run: Path, progress: Progress) -> dict[str, str]:
    """The evaluation of the model's step, from the metrics in the run's folder."""
    try:
        metrics = read_run(run)
        values = [metrics.at(f"eval/{name}", progress.step) for name in ("loss", "perplexity", "bits_per_byte")]
    except (OSError, UserError):
        values = []
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) == 3:
        loss, perplexity, bits = finite
        return {
            "validation loss": f"{loss:.4f} nats a token (perplexity {perplexity:.2f})",
            "validation bits per byte": f"{bits:.4f}",
        }
    best = progress.best_loss
    unit = "nats a token" if progress.loss is None else f"by {progress.loss}"
    known = {} if best is None else {"lowest validation loss of the run so far": f"{best:.4f} {unit}"}
    return {**known, "validation loss": "not found: metrics.jsonl has no evaluation of this step"}


def _changed_options(config: Config, progress: Progress) -> dict[str, Any]:
    """The options that are not at their defaults, as a configuration file holds them."""
    config = replace_fields(config, {"model.vocab_size": progress.requested_vocab_size})
    defaults = to_dict(Config())
    return {
        section: {
            name: value for name, value in values.items() if value != defaults[section][name] and name not in PRIVATE
        }
        for section, values in to_dict(config).items()
    }
