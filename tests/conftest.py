"""What all tests share: several fake CPU devices, strict shapes, a small corpus that is the same everywhere."""

import gc
import json
import os
import random
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also for the processes that tests start, and where a GPU is
os.environ.setdefault(
    "XLA_FLAGS",  # compiles three times as fast, and with the second, which only jaxlib 0.10 knows, again half as much
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # what one test compiled, others load
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**33))  # or JAX takes no lock where it writes and reads
# The place of the cache is then no part of a program's name in it: workers and runs with folders of their own share.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
# A fifth less to compile: Shardy's passes read and write what every operation says of the lines that it comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
from forked import Server

from jaxlm import Trainer
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, replace_fields
from jaxlm.run.setup import resolve
from jaxlm.train import assemble

DEVICES = 4
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")
assemble._assembled = lru_cache(maxsize=32)(assemble.Assembly)  # tests have more programs than a user's process

LONGEST = [
    "sharding",
    "trainer",
    "processes",
    "lora",
    "step",
    "hooks",
    "own_loss",
    "streaming",
    "memory",
    "stops",
    "model",
    "flash",
    "generate",
    "properties",
]
LONGEST += [
    "kill",
    "chat",
    "metrics",
    "sweep",
    "mixture",
    "bad_input",
    "optim",
    "inputs",
    "export",
    "going_on",
    "launch",
    "disk",
    "numbers",
]
WORDS = [
    name.split() for name in ("the a my our", "old small warm naïve", "café cat model row", "reads writes has sees")
]


def documents(count: int, seed: int) -> list[str]:
    """Pseudo-text that a model can learn from: 1 to 40 words a document, the same on every machine."""
    rng = random.Random(seed)
    lengths = [rng.choice((1, 4, 8, 12, 20, 40)) for _ in range(count)]
    return [" ".join(rng.choice(WORDS[i % 4]) for i in range(length)) + ".\n" for length in lengths]


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of compiled programs, of all workers and of the processes that tests start; or that of several runs."""
    base = tmp_path_factory.getbasetemp()
    own = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", own))
    folder.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Path:
    """A folder with train.jsonl (120 documents), validation.jsonl (20) and book.txt (12 in one)."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count, seed in (("train", 120, 1), ("validation", 20, 2)):
        rows = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents(count, seed))]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "book.txt").write_text("\n\n".join(documents(12, 3)), encoding="utf-8")
    (folder / "cache").mkdir()
    (folder / "cache" / "compiled").symlink_to(compiled)
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts processes that need not import JAX again."""
    with Server() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is one worker's, and the longest ones are first, or one of them would be left alone at the end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem.removeprefix("test_"), len(place)))


def pytest_collection_finish() -> None:
    """What was imported is not looked through again and again; tracing makes so much that collecting took a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True)
def own_programs_where_code_is_replaced(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs share programs that were assembled; a test that may plant a fault has its own."""
    shared = assemble._assembled
    if "monkeypatch" in request.fixturenames:
        assemble._assembled = lru_cache(maxsize=32)(assemble.Assembly)
    yield
    assemble._assembled = shared


def slow(*values: Any) -> Any:
    """A case of `parametrize` that only .ci/run runs, or `pytest -m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Pytest's `monkeypatch` for what no program is compiled from: the test shares its programs with others."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def trainer_on(devices: int, config: Config, **more: Any) -> Trainer:
    """On the first ones of this process."""
    return Trainer(resolve(config, jax.devices()[:devices]), **more)


def make_config(tmp_path: Path, corpus: Path, **dotted: Any) -> Config:
    """A run of 4 updates of a tiny model in `tmp_path`: `make_config(tmp_path, corpus, **{"training.seed": 7})`.

    Tokens and compiled programs are cached beside the corpus, for all tests of a process.
    """
    config = Config(
        model=ModelConfig(
            vocab_size=300,
            d_model=32,
            n_heads=2,
            n_layers=2,
            d_ff=64,
            max_seq_len=32,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        training=TrainingConfig(
            batch_size=2,
            gradient_accumulation_steps=1,
            max_steps=4,
            learning_rate=1e-2,
            use_amp=False,
            logging_steps=1,
            eval_steps=4,
            save_steps=4,
            checkpoint_dir=str(tmp_path / "run"),
            report_to=(),
            sample_tokens=0,
        ),
        data=DataConfig(
            train_files=(str(corpus / "train.jsonl"),),
            validation_files=(str(corpus / "validation.jsonl"),),
            max_length=32,
            cache_dir=str(corpus / "cache"),
        ),
    )
    return replace_fields(config, dotted)
