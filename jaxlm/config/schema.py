"""Every option of a run, its default, its meaning and its bounds.

A field is declared once, with `option(default, help, ...)`: the command line, `--help`, the JSON reader and
`validate` are all driven by these declarations. Values are never changed in place: use `dataclasses.replace`.
"""

import dataclasses
from typing import Any

from jaxlm.config.model import ModelConfig
from jaxlm.config.option import Section, option

STDLIB = "python-stdlib"  # the data.dataset_name that is on every machine
PYTHON = "python"  # the data.dataset_name of what a program hands over

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "lamb", "muon", "normuon", "adafactor")
# Optimizers of optax whose steps need nothing but gradients and parameters, are in proportion to the learning rate, and
# treat each parameter by itself (tests/test_optim.py tries each).
FROM_OPTAX = (
    "acprop", "adabelief", "adadelta", "adagrad", "adamax", "adamaxw", "adan", "ademamix", "adopt", "amsgrad", "galore",
    "lars", "nadam", "nadamw", "optimistic_adam_v2", "optimistic_gradient_descent", "radam", "rmsprop", "rprop",
    "sign_sgd", "signum", "simplified_ademamix", "sm3", "yogi",
)  # fmt: skip

# What a user may decide in the middle of a run (training.allow_change): numbers, and rows an update.
MIDWAY = tuple(
    f"training.{name}"
    for name in (
        "learning_rate", "lr_scheduler", "warmup_steps", "warmup_shape", "warmup_min_ratio", "schedule_steps",
        "min_lr_ratio", "lr_power", "decay_fraction", "weight_decay", "batch_size", "gradient_accumulation_steps",
        "batch_schedule",
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """Optimization, precision, saving and reporting. `step` always means an optimizer update."""

    batch_size: int = option(8, "sequences a device in one micro-batch", low=1, resumable=True)
    gradient_accumulation_steps: int = option(8, "micro-batches summed into one update", low=1, resumable=True)
    batch_schedule: tuple[str, ...] = option(
        (),
        "larger updates later: UPDATE:TIMES, from update UPDATE on TIMES as many micro-batches (1001:2,3001:4)",
    )
    num_epochs: float = option(3, "passes over the data; a fraction is fine", above=0, resumable=True)
    max_steps: int | None = option(None, "updates to run, instead of num_epochs", low=1, resumable=True)
    stop_at_step: int | None = option(None, "save and end after this update; the schedule stays", low=1, resumable=True)
    max_time: float | str | None = option(
        None,
        "time after which a run saves and ends with 75, to be gone on with: seconds, or such as 30m, 7.5h, 2d, "
        "1-12:00:00; none: no limit",
        above=0,
        resumable=True,
    )
    early_stopping_patience: int | None = option(
        None, "finish after this many evaluations in a row without a lower loss; none: never", low=1, resumable=True
    )
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
        "update rule; muon: for the blocks' matrices, adam for the rest; normuon: muon with steps of equal size for "
        "each output of a matrix (averaged with beta2); adafactor: without momentum, steps are "
        "learning_rate times the parameter's size, so try 0.01; optax.NAME: optax's own of that name, built with "
        "beta1, beta2, eps and weight_decay where it takes them",
        choices=(*OPTIMIZERS, *(f"optax.{n}" for n in FROM_OPTAX)),
    )
    beta1: float = option(0.9, "first-moment decay (sgd: momentum; adafactor: unused)", low=0, below=1)
    beta2: float = option(0.999, "second-moment decay (lion: momentum decay; adafactor: unused)", low=0, below=1)
    eps: float = option(1e-8, "term that keeps adam's denominator off zero", above=0)
    muon_momentum: float = option(0.95, "muon: decay of the momentum of the blocks' matrices", low=0, below=1)
    muon_coefficients: str = option(
        "jordan",
        "muon: polynomials that make a matrix orthogonal; polar_express: nearer to it after as many",
        choices=("jordan", "polar_express"),
    )
    embedding_lr_ratio: float | None = option(
        None, "the embeddings' learning rate, as a multiple of all others'; none: the same", above=0
    )
    weight_decay: float = option(0.01, "decoupled weight decay (adam, sgd: L2); biases and norms are left out", low=0)
    cautious_decay: bool = option(False, "apply weight_decay only to weights that the update makes smaller, too")
    decay_embeddings: bool = option(True, "apply weight_decay to the embeddings too")
    ema_decay: float | None = option(
        None,
        "decay of an exponential average of the parameters, evaluated, and saved as average_model, too; none: none",
        above=0,
        below=1,
    )
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
    eval_on_start: bool = option(False, "evaluate before the first update too", resumable=True)
    save_steps: int = option(2000, "updates between checkpoints", low=1, resumable=True)
    eval_steps: int = option(1000, "updates between evaluations", low=1, resumable=True)
    logging_steps: int = option(100, "updates between logged rows", low=1, resumable=True)
    checkpoint_dir: str = option("./checkpoints", "the run's folder", path=True, resumable=True)
    save_total_limit: int | None = option(3, "newest checkpoints to keep; 0 or none: all", low=0, resumable=True)
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder to start from, or latest", path=True, resumable=True
    )
    allow_change: tuple[str, ...] = option(
        (), "fields that you decide to change in the middle of the run", choices=MIDWAY, resumable=True
    )
    init_from: str | None = option(
        None,
        "model whose parameters, architecture and tokenizer to start from: a best_model, final_model or checkpoint, or "
        "a folder or Hub name for transformers; model options that are set must agree with it, but for dropouts, which "
        "are the model's own unless they are set",
        path=True,
    )
    lora_rank: int | None = option(
        None, "rank of the adapters that are trained instead of the model of init_from (LoRA); none: no adapters", low=1
    )
    lora_alpha: float | None = option(
        None, "what adapters add is multiplied by this, divided by their rank; none: twice the rank", above=0
    )
    lora_dropout: float = option(0.0, "dropout on what adapters read", low=0, below=1)
    lora_targets: tuple[str, ...] = option(
        ("attention/*", "mlp/*"),
        "linear layers of a block that get adapters: names such as attention/qkv, attention/out, mlp/up, or patterns",
    )
    freeze: tuple[str, ...] = option(
        (), "parameters that are not trained: names such as token_embedding, blocks/mlp, or patterns (blocks/*/bias)"
    )
    report_to: tuple[Any, ...] = option(
        ("tensorboard",),
        "where metrics go beside metrics.jsonl; also module:Class, a sink of your own (jaxlm/monitor/sinks.py)",
        choices=("tensorboard", "wandb", "trackio", "jsonl"),
        others=True,
        resumable=True,
    )
    wandb_project: str = option("jaxlm", "project (report_to wandb, trackio)", resumable=True)
    histogram_steps: int | None = option(
        None,
        "updates between histograms of parameters and gradients, each the time of an update; none: no histograms",
        low=1,
        resumable=True,
    )
    noise_scale_steps: int | None = option(
        None,
        "updates between measurements of the gradient noise scale, which says what batch pays; each takes the time of "
        "one to three updates; none: none",
        low=1,
        resumable=True,
    )
    layer_norm_steps: int | None = option(
        None,
        "updates between norms of the gradients, updates and parameters of each layer, each the time of an update or "
        "two; none: none",
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
        "MiB of logits that a device holds at a time; none: those of 512 tokens on CPU, at most 64; 512 on a GPU",
        low=1,
        high=2**20,
        resumable=True,
    )
    deterministic: bool = option(
        True,
        "on GPUs only operations that repeat bit for bit, so that a resumed run does; false may be faster",
        resumable=True,
    )
    own_kernels: bool = option(True, "GPU kernels of jaxlm for norms and the loss; false: XLA's", resumable=True)
    xla_preset: str = option(
        "none",
        "options of XLA on GPUs: overlap for communication while computing, over several GPUs; none: XLA's own choice",
        choices=("none", "overlap"),
        resumable=True,
    )
    xla_options: tuple[str, ...] = option(
        (), "more options of XLA, NAME=VALUE, such as xla_gpu_enable_triton_gemm=false", resumable=True
    )
    compiled_program: str | None = option(
        None, "folder that jaxlm plan has saved a program in: run if it fits; not yet tried on a GPU", resumable=True
    )
    keep_autotuning: bool = option(
        False, "keep what XLA found fastest on the GPU, for later starts and jaxlm plan; not yet tried", resumable=True
    )
    memory_fraction: float = option(
        0.75, "share of a GPU's memory that JAX takes at the start", above=0, high=1, resumable=True
    )
    use_deepspeed: bool = option(False, "ZeRO stage 2, or what deepspeed_config says; zero_stage wins", resumable=True)
    deepspeed_config: str | None = option(
        None, "DeepSpeed JSON file: sets the fields that it maps to (needs use_deepspeed)", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The text, how it is split, tokenized and packed."""

    dataset_name: str = option(
        "wikitext", "python-stdlib (built in), a data set on the Hugging Face Hub, or python: what a program hands over"
    )
    dataset_config: str | None = option("wikitext-103-raw-v1", "configuration of the Hub data set")
    dataset_split: str = option("train", "split to train on")
    validation_split: str | None = option("validation", "split to evaluate on; none: hold out validation_fraction")
    train_files: tuple[str, ...] = option(
        (), "own text instead of dataset_name: folders and files, of text, JSON, tables; also compressed", path=True
    )
    validation_files: tuple[str, ...] = option((), "own held-out text; none: hold out validation_fraction", path=True)
    sources: tuple[str, ...] = option(
        (),
        "several own texts, mixed: each NAME=FILES:WEIGHT, FILES as in train_files, with | between them, WEIGHT its "
        "share of the rows, as a part of the sum of all weights",
    )
    anneal_weights: tuple[str, ...] = option((), "weights from update anneal_from on: NAME=WEIGHT; of those left out 0")
    anneal_from: int | None = option(None, "update from which on anneal_weights hold; none: never", low=2)
    validation_fraction: float = option(
        0.05, "share of the text held out where there is no validation split; 0: none", low=0, below=1
    )
    format: str = option(
        "auto",
        "what rows hold: text, messages (of roles), or prompt_completion; auto: text where text_column is, else what "
        "the first row has",
        choices=("auto", "text", "messages", "prompt_completion"),
    )
    text_column: str = option("text", "column or key that holds the text")
    loss_on: str = option(
        "completions",
        "what is learned of messages, and of prompts with completions: completions (the assistant's turns), all, or "
        "last_turn (the assistant's last)",
        choices=("completions", "all", "last_turn"),
    )
    chat_template: str | None = option(
        None,
        "what makes text of messages: a file of Jinja, or plain; none: the tokenizer's own, plain for a new one",
        path=True,
    )
    too_long: str = option(
        "cut",
        "what becomes of documents longer than a row: cut (text into pieces, conversations at the row's end), drop, or "
        "error",
        choices=("cut", "drop", "error"),
    )
    document_separator: str | None = option(
        None,
        "line that ends a document within a text, such as ***, or an empty one; in brackets, such as [SEP], anywhere; "
        "none: nothing",
    )
    on_bad_document: str = option(
        "stop",
        "what a document does that is not UTF-8, not text, bad JSON, bad CSV, or that cannot be tokenized: "
        "stop before the run, or skip: it is left out, and that is said",
        choices=("stop", "skip"),
    )
    max_documents: int | None = option(
        None, "only so many documents, the first, of each text that is read, for a quick try; none: all", low=1
    )
    tokenizer_path: str | None = option(None, "a tokenizer.json of your own, instead of training one", path=True)
    bos_token: str | None = option(None, "token that begins a document; none: as the tokenizer's folder or names say")
    eos_token: str | None = option(None, "token that ends a document and a generated text; none: as for bos_token")
    pad_token: str | None = option(None, "token that pads, where an export needs one; none: as for bos_token")
    streaming: bool = option(False, "train on the first shards of the text while later ones are tokenized")
    max_length: int = option(1024, "tokens a row; longer documents are cut into pieces", low=2)
    min_length: int = option(10, "documents of fewer tokens (with <bos> and <eos>) are dropped", low=0)
    pack_sequences: bool = option(True, "put several documents into a row, kept apart in attention; false: pad")
    packing_strategy: str = option(
        "greedy", "how documents are put into rows", choices=("greedy", "first_fit", "best_fit", "concat")
    )
    preprocessing_num_workers: int = option(8, "threads that tokenize", low=1, resumable=True)
    cache_dir: str | None = option(
        None, "where tokenized text and compiled programs are kept; none: ~/.cache/jaxlm", path=True, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: `Config(model=ModelConfig(...), training=TrainingConfig(...), data=DataConfig(...))`."""

    model: ModelConfig = ModelConfig()  # noqa: RUF009 - it can't be changed
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise TypeError(f"{name} ({getattr(self, name)!r}) must be a {section.__name__}")


SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
FIELDS: dict[str, dataclasses.Field[Any]] = {
    f"{name}.{field.name}": field for name, section in SECTIONS.items() for field in dataclasses.fields(section)
}
