"""Every option of a run, its default, its meaning and its bounds; imports nothing heavy.

A field is declared once, with `option(default, help, ...)`: the command line, `--help`, the JSON reader and
`validate` are all driven by these declarations. Values are never changed in place: use `dataclasses.replace`.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.errors import UserError

T = TypeVar("T")
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # what JAX computes with: int32, float32
SHOWN = 200  # characters of a wrong value that a message repeats


def option(
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    others: Callable[[Any], bool] | None = None,
    resumable: bool = False,
) -> T:
    """Declares a field. `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.

    A choice may end in a star, which stands for anything; `others` tells whether what is none of `choices` is valid all
    the same.

    `resumable` marks a field that does not change the training itself, so that a run may go on with another value.
    """
    bounds = {"choices": choices, "low": low, "high": high, "above": above, "below": below, "others": others}
    return typing.cast(T, dataclasses.field(default=default, metadata={"help": help, "resumable": resumable, **bounds}))


def _is_own_sink(item: Any) -> bool:
    """Whether an entry of report_to is a sink of the user's own: "module:Class", or an object (see jaxlm/sinks.py)."""
    if isinstance(item, str):
        return re.fullmatch(r"[^:]+:[^:]+", item) is not None
    methods = (getattr(item, name, None) for name in ("write", "close"))
    return not isinstance(item, type) and all(callable(method) for method in methods)


@dataclasses.dataclass(frozen=True)
class _Section:
    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # lists are welcome in config files; frozen sections hold tuples
                object.__setattr__(self, field.name, tuple(value))


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """The Transformer. Defaults are those of GPT-2 small."""

    vocab_size: int = option(
        50000, "BPE vocabulary to train; the model's is the size the tokenizer reached", low=1, high=2**24
    )
    d_model: int = option(768, "width of the residual stream", low=1)
    n_heads: int = option(12, "attention heads; must divide d_model", low=1)
    n_kv_heads: int | None = option(
        None, "heads of keys and values, each shared by n_heads / n_kv_heads query heads; none: n_heads", low=1
    )
    n_layers: int = option(12, "Transformer blocks", low=1)
    d_ff: int = option(3072, "width of the feed-forward layer", low=1)
    max_seq_len: int = option(1024, "longest sequence the model can take, in tokens", low=2, high=2**24)
    dropout: float = option(0.1, "dropout of embeddings and of each block's two outputs", low=0, below=1)
    attention_dropout: float = option(0.1, "dropout of the attention weights", low=0, below=1)
    activation: str = option(
        "gelu",
        "feed-forward activation; gelu is GPT-2's tanh form, gelu_exact the one with erf; swiglu and geglu (tanh form) "
        "are gated: a third matrix, all of width d_ff",
        choices=("gelu", "gelu_exact", "relu", "swish", "swiglu", "geglu"),
    )
    norm: str = option("layernorm", "normalisation of the residual stream", choices=("layernorm", "rmsnorm"))
    norm_epsilon: float = option(1e-5, "term that keeps a norm's denominator off zero", above=0)
    use_bias: bool = option(True, "biases in linear layers and in layernorm (rmsnorm never has one)")
    pre_norm: bool = option(True, "normalise before each sub-layer (false: after, as in the 2017 Transformer)")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", resumable=True
    )
    remat_policy: str = option(
        "full",
        "what gradient_checkpointing recomputes: everything, or all but matrix products",
        choices=("full", "dots"),
        resumable=True,
    )
    positions: str = option("learned", "how positions enter", choices=("learned", "sinusoidal", "rotary"))
    rope_theta: float = option(10000.0, "base of the rotary frequencies (positions=rotary)", above=0)
    rope_scaling: str | None = option(
        None,
        "stretch rotary positions to a longer context: linear for all frequencies, llama3 and yarn for low ones; "
        "none: as they are",
        choices=("linear", "llama3", "yarn"),
    )
    rope_scaling_factor: float = option(1.0, "how many times longer rope_scaling makes the context", low=1)
    rope_original_length: int | None = option(
        None, "tokens of the context before it was stretched (needed by rope_scaling llama3 and yarn)", low=1
    )
    rope_low_freq_factor: float = option(
        1.0, "llama3: frequencies that turn fewer times than this in the original length are stretched", above=0
    )
    rope_high_freq_factor: float = option(
        4.0, "llama3: frequencies that turn more times than this in the original length stay", above=0
    )
    qk_norm: bool = option(False, "rmsnorm with a learned scale over each head's queries and keys (as in Qwen3)")
    logit_softcap: float | None = option(
        None, "squash output logits to this: cap * tanh(logits / cap) (as in Gemma 2); none: as they are", above=0
    )
    tie_embeddings: bool = option(True, "use the token embedding as the output projection too")
    scan_layers: bool | None = option(
        None,
        "loop over one compiled block: compiles faster, runs slower; none: with gradient_checkpointing or stage 3, "
        "which save no memory without it",
        resumable=True,
    )
    attention: str = option(
        "auto",
        "attention kernel: blockwise runs everywhere; on GPUs and in 16 bits, cudnn is for rows without packing and "
        "attention_dropout, pallas for all; auto takes the first that can of cudnn, pallas, blockwise",
        choices=("auto", "blockwise", "cudnn", "pallas"),
    )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


@dataclasses.dataclass(frozen=True)
class TrainingConfig(_Section):
    """Optimization, precision, saving and reporting. `step` always means an optimizer update."""

    batch_size: int = option(8, "sequences a device in one micro-batch", low=1, resumable=True)
    gradient_accumulation_steps: int = option(8, "micro-batches summed into one update", low=1, resumable=True)
    num_epochs: float = option(3, "passes over the data; a fraction is fine", above=0, resumable=True)
    max_steps: int | None = option(None, "updates to run, instead of num_epochs", low=1, resumable=True)
    stop_at_step: int | None = option(None, "save and end after this update; the schedule stays", low=1, resumable=True)
    learning_rate: float = option(1e-4, "peak learning rate", above=0)
    lr_scheduler: str = option(
        "cosine",
        "shape of the decay after warm-up; wsd: none but over the last decay_fraction, linearly",
        choices=("cosine", "linear", "polynomial", "constant", "wsd"),
    )
    warmup_steps: int = option(2000, "updates of warm-up (see warmup_shape); shortened to a tenth of the run", low=0)
    warmup_shape: str = option("linear", "how warm-up rises; log is DeepSpeed's", choices=("linear", "log"))
    warmup_min_ratio: float = option(0.0, "learning rate that warm-up starts from, of the peak", low=0, high=1)
    schedule_steps: int | None = option(None, "updates the schedule is laid out for; none: those of the run", low=1)
    min_lr_ratio: float = option(0.1, "learning rate at the end, as a fraction of the peak", low=0, high=1)
    lr_power: float = option(2.0, "exponent of the polynomial decay", above=0)
    decay_fraction: float = option(
        0.1, "wsd: share of the updates after warm-up in which the learning rate falls", above=0, high=1
    )
    optimizer: str = option(
        "adamw",
        "update rule; muon: for the blocks' matrices, adam for the rest; adafactor: without momentum, steps are "
        "learning_rate times the parameter's size, so try 0.01; optax.NAME: optax's own of that name, such as "
        "optax.nadamw, built with beta1, beta2, eps and weight_decay where it takes them",
        choices=("adamw", "adam", "sgd", "lion", "lamb", "muon", "adafactor", "optax.*"),
    )
    beta1: float = option(0.9, "first-moment decay (sgd: momentum; adafactor: unused)", low=0, below=1)
    beta2: float = option(0.999, "second-moment decay (lion: momentum decay; adafactor: unused)", low=0, below=1)
    eps: float = option(1e-8, "term that keeps adam's denominator off zero", above=0)
    muon_momentum: float = option(0.95, "muon: decay of the momentum of the blocks' matrices", low=0, below=1)
    weight_decay: float = option(0.01, "decoupled weight decay (adam, sgd: L2); biases and norms are left out", low=0)
    decay_embeddings: bool = option(True, "apply weight_decay to the embeddings too")
    z_loss: float = option(
        0.0,
        "weight of the squared log of the softmax's denominator, added to what is minimised (1e-4 in PaLM); reported "
        "losses are without it",
        low=0,
    )
    max_grad_norm: float | None = option(1.0, "clip the global gradient norm to this; none: no clipping", above=0)
    use_amp: bool = option(True, "compute in amp_dtype (parameters stay float32); false: float32 throughout")
    amp_dtype: str = option("bfloat16", "16-bit type to compute in", choices=("bfloat16", "float16"))
    loss_scale: float = option(0, "float16: fixed factor on the loss; 0: dynamic", low=0)
    initial_loss_scale_power: int = option(16, "float16: the dynamic loss scale starts at 2 to this", low=0, high=31)
    loss_scale_window: int = option(1000, "float16: updates without overflow before the scale is doubled", low=1)
    loss_scale_hysteresis: int = option(2, "float16: overflows before the scale is halved", low=1)
    min_loss_scale: float = option(1, "float16: the run ends if it overflows at this dynamic scale", above=0)
    max_skipped_steps: int = option(
        20,
        "the run ends after more updates in a row that were not finite (float16: see min_loss_scale)",
        low=0,
        resumable=True,
    )
    watchdog_seconds: float | None = option(
        None,
        "end a run whose update takes so long; none: 20 times the usual, at least 60; 0: never",
        low=0,
        resumable=True,
    )
    accumulator_dtype: str = option(
        "float32", "type that micro-batches' gradients are summed in", choices=("float32", "bfloat16", "float16")
    )
    seed: int = option(42, "seed of initialisation, data order and dropout", low=0, high=2**31 - 1)
    save_steps: int = option(2000, "updates between checkpoints", low=1, resumable=True)
    eval_steps: int = option(1000, "updates between evaluations", low=1, resumable=True)
    logging_steps: int = option(100, "updates between logged rows", low=1, resumable=True)
    checkpoint_dir: str = option("./checkpoints", "the run's folder", resumable=True)
    save_total_limit: int | None = option(3, "newest checkpoints to keep; 0 or none: all", low=0, resumable=True)
    resume_from_checkpoint: str | None = option(None, "checkpoint folder to start from, or latest", resumable=True)
    init_from: str | None = option(
        None,
        "model whose parameters, architecture and tokenizer to start from: a best_model, final_model or checkpoint, or "
        "a folder or Hub name for transformers; model options that are not at their defaults must agree with it",
    )
    report_to: tuple[Any, ...] = option(
        ("tensorboard",),
        "where metrics go beside metrics.jsonl; also module:Class, a sink of your own (jaxlm/sinks.py)",
        choices=("tensorboard", "wandb", "trackio", "jsonl"),
        others=_is_own_sink,
        resumable=True,
    )
    wandb_project: str = option("jaxlm", "project (report_to wandb, trackio)", resumable=True)
    histogram_steps: int | None = option(
        None,
        "updates between histograms of parameters and gradients, each the time of an update; none: no histograms",
        low=1,
        resumable=True,
    )
    profile_steps: str | None = option(
        None,
        "updates to trace, A:B (both included), for TensorBoard's profile page or Perfetto; none: none",
        resumable=True,
    )
    sample_prompt: str = option("", "text that the samples printed at each evaluation go on from", resumable=True)
    sample_tokens: int = option(100, "tokens in such a sample; 0: no samples", low=0, resumable=True)
    world_size: int | None = option(None, "devices that must be there; none: use what is there", low=1, resumable=True)
    distributed_backend: str | None = option(
        None, "collectives that must be in use: nccl on GPUs, gloo on CPU", choices=("nccl", "gloo"), resumable=True
    )
    zero_stage: int | None = option(
        None,
        "shard over devices: 1 optimizer state, 2 and gradients, 3 and parameters; none: 0, or 2 with use_deepspeed",
        low=0,
        high=3,
        resumable=True,
    )
    zero_group_size: int | None = option(
        None, "devices that share one sharded copy, such as those of a host; none: all", low=1, resumable=True
    )
    tensor_parallel: int = option(1, "devices that each layer's matrices are split over", low=1, resumable=True)
    offload_optimizer: bool = option(False, "keep the optimizer state in host memory", resumable=True)
    loss_chunk_mib: int | None = option(
        None,
        "MiB of float32 logits that a device holds at a time; none: 32 on CPU, 512 on a GPU",
        low=1,
        high=2**20,
        resumable=True,
    )
    deterministic: bool = option(
        True,
        "on GPUs only operations that repeat bit for bit, so that a resumed run does; false may be faster",
        resumable=True,
    )
    xla_preset: str = option(
        "none",
        "options of XLA on GPUs: overlap for communication while computing, over several GPUs; none: XLA's own choice",
        choices=("none", "overlap"),
        resumable=True,
    )
    xla_options: tuple[str, ...] = option(
        (), "more options of XLA, NAME=VALUE, such as xla_gpu_enable_triton_gemm=false", resumable=True
    )
    memory_fraction: float = option(
        0.75, "share of a GPU's memory that JAX takes at the start", above=0, high=1, resumable=True
    )
    use_deepspeed: bool = option(False, "ZeRO stage 2, or what deepspeed_config says; zero_stage wins", resumable=True)
    deepspeed_config: str | None = option(
        None, "DeepSpeed JSON file: sets the fields that it maps to (needs use_deepspeed)", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """The text, how it is split, tokenized and packed."""

    dataset_name: str = option("wikitext", "python-stdlib (built in) or a data set on the Hugging Face Hub")
    dataset_config: str | None = option("wikitext-103-raw-v1", "configuration of the Hub data set")
    dataset_split: str = option("train", "split to train on")
    validation_split: str | None = option("validation", "split to evaluate on; none: hold out validation_fraction")
    train_files: tuple[str, ...] = option((), "own text instead of dataset_name: .txt, .jsonl, .csv or .parquet files")
    validation_files: tuple[str, ...] = option((), "own held-out text; none: hold out validation_fraction")
    validation_fraction: float = option(
        0.05, "share of the text held out where there is no validation split", above=0, below=1
    )
    text_column: str = option("text", "column or key that holds the text")
    on_bad_document: str = option(
        "stop",
        "what a document does that is not UTF-8, not text, bad JSON, bad CSV, or that cannot be tokenized: "
        "stop before the run, or skip: it is left out, and that is said",
        choices=("stop", "skip"),
    )
    tokenizer_path: str | None = option(None, "a tokenizer.json of your own, instead of training one")
    max_length: int = option(1024, "tokens a row; longer documents are cut into pieces", low=2)
    min_length: int = option(10, "documents of fewer tokens (with <bos> and <eos>) are dropped", low=0)
    pack_sequences: bool = option(True, "put several documents into a row, kept apart in attention; false: pad")
    packing_strategy: str = option(
        "greedy", "how documents are put into rows", choices=("greedy", "first_fit", "best_fit", "concat")
    )
    preprocessing_num_workers: int = option(8, "threads that tokenize", low=1, resumable=True)
    cache_dir: str | None = option(
        None, "where tokenized text and compiled programs are kept; none: ~/.cache/jaxlm", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: `Config(model=ModelConfig(...), training=TrainingConfig(...), data=DataConfig(...))`."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise TypeError(f"{name} ({getattr(self, name)!r}) must be a {section.__name__}")


SECTIONS: dict[str, type[_Section]] = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to `name`, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` has the declared type: an int passes for a float, a bool passes for neither."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for kind in options:
        if typing.get_origin(kind) is tuple:
            item_type = typing.get_args(kind)[0]
            if isinstance(value, tuple) and all(item_type is Any or isinstance(item, item_type) for item in value):
                return True
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return True
    return False


def type_name(annotation: Any) -> str:
    """How a declared type is called in messages, such as 'int or none'."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    names = {type(None): "none", bool: "true or false", str: "text"}
    return " or ".join(
        "list of text" if typing.get_origin(kind) is tuple else names.get(kind, kind.__name__) for kind in options
    )


def replace_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with the fields named in `values` ("section.field") set.

    Raises:
      UserError: a name is unknown.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for dotted, value in values.items():
        section, _, field = dotted.partition(".")
        if section not in SECTIONS:
            raise UserError(
                f"{dotted}: unknown section {section!r}{nearest(section, SECTIONS)}; use model, training or data"
            )
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        if field not in known:
            elsewhere = [f"{s}.{field}" for s in SECTIONS if field in {f.name for f in dataclasses.fields(SECTIONS[s])}]
            hint = f" (did you mean {elsewhere[0]}?)" if elsewhere else nearest(field, known)
            raise UserError(f"{dotted}: unknown field{hint}")
        changes[section][field] = value
    sections = {name: dataclasses.replace(getattr(config, name), **changes[name]) for name in SECTIONS}
    return Config(**typing.cast(Any, sections))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values, by section; an object in report_to as the name of its class."""
    return {
        name: {field.name: plain(getattr(getattr(config, name), field.name)) for field in dataclasses.fields(section)}
        for name, section in SECTIONS.items()
    }


def plain(value: Any) -> Any:
    """A field's value as JSON has it: a tuple as a list, an object as "module:Class"."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__module__}:{type(value).__qualname__}"


def from_dict(values: Any, where: str) -> Config:
    """The configuration held by the JSON object `values`; fields left out keep their defaults.

    Raises:
      UserError: not an object of sections, or an unknown name. `where` says where it came from.
    """
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise UserError(f'{where}: expected {{"model": {{}}, "training": {{}}, "data": {{}}}}')
    unknown = [name for name in values if name not in SECTIONS]
    if unknown:
        raise UserError(
            f"{where}: unknown section {unknown[0]!r}{nearest(unknown[0], SECTIONS)}; use model, training, data"
        )
    fields = {f"{section}.{name}": value for section in values for name, value in values[section].items()}
    try:
        return replace_fields(Config(), fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def resolved(config: Config) -> Config:
    """With what follows from other fields filled in: zero_stage and scan_layers."""
    stage = config.training.zero_stage or 0
    scan = config.model.scan_layers
    if scan is None:
        scan = config.model.gradient_checkpointing or stage == 3
    return replace_fields(config, {"training.zero_stage": stage, "model.scan_layers": scan})


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.field": (old, new)} for the fields that change the training and differ."""
    return {
        f"{name}.{field.name}": (getattr(getattr(old, name), field.name), getattr(getattr(new, name), field.name))
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        if not field.metadata["resumable"]
        and getattr(getattr(old, name), field.name) != getattr(getattr(new, name), field.name)
    }


def excerpt(value: Any) -> str:
    """`value` for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_choice(item: Any, choices: Iterable[str]) -> bool:
    return isinstance(item, str) and any(fnmatchcase(item, choice) for choice in choices)


def _check_other(dotted: str, limits: Mapping[str, Any], item: Any) -> None:
    """Raises UserError unless `item`, which is none of the choices, is valid all the same."""
    if limits["others"] is not None and limits["others"](item):
        return
    shown, hint = (item[:SHOWN], nearest(item, limits["choices"])) if isinstance(item, str) else (excerpt(item), "")
    own = "" if limits["others"] is None else ", module:Class, or an object with write(row, step) and close()"
    raise UserError(f"{dotted} ({shown}) is not one of {', '.join(limits['choices'])}{own}{hint}")


def check_field(dotted: str, field: Any, annotation: Any, value: Any) -> None:
    """Checks one value against its declared type and bounds; UserError names it `dotted`."""
    if not accepts(annotation, value):
        raise UserError(f"{dotted} ({excerpt(value)}) must be {type_name(annotation)}")
    limits = field.metadata
    if value is None:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if limits["choices"] and not _is_choice(item, limits["choices"]):
            _check_other(dotted, limits, item)
        if isinstance(item, str) and "\0" in item:
            raise UserError(f"{dotted} ({excerpt(item)}) holds a NUL character; remove it")
    if isinstance(value, int | float):
        largest = LARGEST_FLOAT if accepts(annotation, 0.5) else LARGEST_INT
        if not abs(value) <= largest:  # NaN compares with nothing
            raise UserError(f"{dotted} ({excerpt(value)}) must be a finite number, at most {largest}")
        if limits["low"] is not None and value < limits["low"]:
            raise UserError(f"{dotted} ({value}) must be at least {limits['low']}")
        if limits["above"] is not None and value <= limits["above"]:
            raise UserError(f"{dotted} ({value}) must be greater than {limits['above']}")
        if limits["high"] is not None and value > limits["high"]:
            raise UserError(f"{dotted} ({value}) must be at most {limits['high']}")
        if limits["below"] is not None and value >= limits["below"]:
            raise UserError(f"{dotted} ({value}) must be less than {limits['below']}")


def _check_home_folders(config: Config) -> None:
    """Refuses paths such as ~nobody/text, where there is no user of that name."""
    training, data = config.training, config.data
    paths: dict[str, Iterable[str | None]] = {
        "training.checkpoint_dir": [training.checkpoint_dir],
        "training.resume_from_checkpoint": [training.resume_from_checkpoint],
        "training.init_from": [training.init_from],
        "data.train_files": data.train_files,
        "data.validation_files": data.validation_files,
        "data.tokenizer_path": [data.tokenizer_path],
        "data.cache_dir": [data.cache_dir],
    }
    for dotted, named in paths.items():
        for path in named:
            try:
                Path(path or "").expanduser()
            except RuntimeError as error:
                raise UserError(f"{dotted} ({path}): there is no such user; write the path in full") from error


def _check_model(model: ModelConfig) -> None:
    """What has to fit together in the model."""
    if model.d_model % model.n_heads:
        raise UserError(f"model.n_heads ({model.n_heads}) must divide model.d_model ({model.d_model})")
    if model.n_heads % model.kv_heads:
        raise UserError(f"model.n_kv_heads ({model.n_kv_heads}) must divide model.n_heads ({model.n_heads})")
    if model.positions != "learned" and model.d_model // model.n_heads % 2:
        raise UserError(
            f"model.positions ({model.positions}) needs an even head size; "
            f"model.d_model / model.n_heads is {model.d_model // model.n_heads}"
        )
    if model.rope_scaling is None:
        return
    named = f"model.rope_scaling ({model.rope_scaling})"
    if model.positions != "rotary":
        raise UserError(f"{named} needs model.positions rotary, not {model.positions}")
    if model.rope_scaling != "linear" and model.rope_original_length is None:
        raise UserError(f"{named} needs model.rope_original_length, the context in tokens before it was stretched")
    if model.rope_scaling == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise UserError(
            f"model.rope_high_freq_factor ({model.rope_high_freq_factor}) must be greater than "
            f"model.rope_low_freq_factor ({model.rope_low_freq_factor})"
        )
    if model.rope_scaling == "yarn" and model.rope_theta <= 1:
        raise UserError(f"{named} needs model.rope_theta ({model.rope_theta}) greater than 1")


def check_fields(config: Config) -> None:
    """Checks each value by itself, against its declared type and bounds; UserError names it."""
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            check_field(f"{name}.{field.name}", field, hints[field.name], getattr(getattr(config, name), field.name))
    _check_home_folders(config)


def profiled_steps(text: str) -> tuple[int, int]:
    """First and last update of training.profile_steps, "A:B", counted from 1.

    Raises:
      UserError: not of that form, or A is 0 or after B.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"training.profile_steps ({text}) must be A:B, the first and the last update, such as 11:15")
    return first, last


def xla_option(text: str) -> tuple[str, str | bool]:
    """Name and value of an item of training.xla_options, "NAME=VALUE".

    Raises:
      UserError: not of that form.
    """
    found = re.fullmatch(r"(xla_\w+)=(\S+)", text)
    if not found:
        raise UserError(
            f"training.xla_options ({excerpt(text)}) must be xla_NAME=VALUE, such as xla_gpu_enable_triton_gemm=false"
        )
    name, value = found.groups()
    return name, value == "true" if value in ("true", "false") else value


def validate(config: Config) -> Config:
    """Checks everything that can be known without touching files or devices; returns `config`.

    Raises:
      UserError: names the field, its value and what to do.
    """
    check_fields(config)
    model, training, data = config.model, config.training, config.data
    _check_model(model)
    if training.profile_steps is not None:
        profiled_steps(training.profile_steps)
    for text in training.xla_options:
        xla_option(text)
    if data.max_length > model.max_seq_len:
        raise UserError(
            f"data.max_length ({data.max_length}) exceeds model.max_seq_len ({model.max_seq_len}); lower it"
        )
    if model.vocab_size < 259 and data.tokenizer_path is None and training.init_from is None:
        raise UserError(f"model.vocab_size ({model.vocab_size}) must be at least 259: 256 bytes and 3 special tokens")
    if data.validation_files and not data.train_files:
        raise UserError("data.validation_files is set but data.train_files is not; set both, or validation_split")
    if data.min_length > data.max_length:
        raise UserError(f"data.min_length ({data.min_length}) exceeds data.max_length ({data.max_length}); lower it")
    if not training.loss_scale and training.min_loss_scale > 2**training.initial_loss_scale_power:
        raise UserError(
            f"training.min_loss_scale ({training.min_loss_scale:g}) exceeds what the dynamic loss scale starts at, 2 "
            f"to training.initial_loss_scale_power ({training.initial_loss_scale_power}); lower it"
        )
    if training.checkpoint_dir == "":
        raise UserError("training.checkpoint_dir is empty; name a folder")
    resume = training.resume_from_checkpoint
    if resume is not None and resume.endswith((".pt", ".pth", ".bin", ".ckpt")):
        path = Path(resume)
        raise UserError(
            f"training.resume_from_checkpoint ({resume}): checkpoints here are folders; "
            f"use {path.with_name(path.stem.replace('-', '_'))}"
        )
    return config
