"""Training a part: adapters beside a frozen model, and frozen parameters."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config, slow, trainer_on
from flax import nnx
from flax.traverse_util import flatten_dict
from test_step import STILL, TRAINING, assembled, assert_close, config_of, make_batch, regroup

from jaxlm import Trainer, load
from jaxlm.config import Config, TrainingConfig, replace_fields
from jaxlm.errors import UserError
from jaxlm.parallel.layout import bytes_a_device
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import assemble
from jaxlm.train.numbers import run_numbers
from jaxlm.train.trainable import divided, joined, merged

LORA = {"lora_rank": 3, "lora_alpha": 5.0, "init_from": "somewhere"}
GROUPED = dataclasses.replace(STILL, n_heads=4, n_kv_heads=2, activation="swiglu", positions="rotary")


def state_of(config: Config, *layout: Any) -> tuple[Any, Any]:
    """The program, and its first state with an adapter that does something."""
    assembly, single, numbers = assembled(config, *layout), assembled(config), run_numbers(config.training)
    bent = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.05 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape) * (path[-1].key == "b"),
        jax.device_get(single.init(numbers).params),
    )
    shardings = jax.tree.map(lambda x: x.sharding, assembly.abstract_state.params)
    held = jax.jit(assembly.layout.from_whole, out_shardings=shardings)(bent)
    return assembly, dataclasses.replace(assembly.init(numbers), params=held)


@pytest.mark.parametrize("model", [slow(STILL), GROUPED], ids=["gpt2", "grouped"])
def test_adapters_are_what_their_paper_says(model: Any) -> None:
    """The loss is that of kernels + alpha / rank * a @ b, and gradients are those of that sum."""
    config = config_of(model, **LORA)
    assembly, state = state_of(config)
    batch = {name: x[0] for name, x in make_batch().items()}
    plain = assembled(config_of(model))

    def loss_of_merged(params: Any) -> jax.Array:
        network = nnx.merge(plain.graphdef, merged(params, config.training))
        logits = network.logits(network(batch["tokens"], batch["segments"], batch["positions"]))
        kept = batch["segments"] > 0
        nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        return jnp.where(kept, nats, 0).sum()

    nats, _ = assembly.eval_step(state.params, batch)
    expected, gradients = jax.jit(jax.value_and_grad(loss_of_merged))(state.params)
    assert float(nats) == pytest.approx(float(expected), rel=1e-5)
    alone = merged(dict(state.params), dataclasses.replace(config.training, lora_alpha=10.0))
    assert np.abs(alone["blocks"]["mlp"]["up"]["kernel"] - state.params["blocks"]["mlp"]["up"]["kernel"]).max() > 1e-3
    plainest = config_of(model, **LORA, optimizer="sgd", beta1=0.0, max_grad_norm=None, weight_decay=0.0)
    sgd, numbers = assembled(plainest), run_numbers(plainest.training) | {"learning_rate": np.float32(1e-2)}
    start = dataclasses.replace(sgd.init(numbers), params=state.params)
    moved, metrics = sgd.jit_step(donate=False)(start, make_batch(), numbers)
    trained, frozen = divided(gradients, config.training)
    count = float((batch["segments"] > 0).sum())
    norm = np.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(trained))) / count
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-3)
    before, after = divided(state.params, config.training), divided(moved.params, config.training)
    change = jax.tree.map(lambda a, b: (a - b) / 1e-2, before[0], after[0])
    assert_close(change, jax.tree.map(lambda g: g / count, trained), 2e-4)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True))
    assert frozen


def test_adapters_begin_with_nothing() -> None:
    config = config_of(STILL, **LORA)
    assembly = assembled(config)
    state = assembly.init(run_numbers(TRAINING))
    assert float(jnp.abs(state.params["blocks"]["mlp"]["up"]["adapter"]["b"]).max()) == 0
    a = state.params["blocks"]["attention"]["qkv"]["adapter"]["a"]
    assert a.shape == (STILL.n_layers, STILL.d_model, 3, 3)
    assert 0.8 * STILL.d_model**-0.5 < float(jnp.abs(a).max()) <= STILL.d_model**-0.5
    base, _ = assembled(config_of(STILL)).base
    assert flatten_dict(base).keys() == flatten_dict(assembly.base[0]).keys()


@pytest.mark.slow
def test_layouts_do_not_change_adapters() -> None:
    layout = (1, 2, 2), 3
    config = config_of(dataclasses.replace(STILL, n_heads=4), **LORA, lora_dropout=0.2)
    batches = [regroup(make_batch(seed=s), 2) for s in range(2)]
    ends = []
    for each in [(), layout]:
        assembly, state = state_of(config, *each)
        step, numbers = assembly.jit_step(donate=False), run_numbers(config.training)
        for batch in batches:
            state, _ = step(state, batch, numbers | {"learning_rate": np.float32(1e-2)})
        ends.append(jax.device_get(jax.jit(assembly.layout.to_whole)(state.params)))
    assert_close(*ends, 1e-5)


@pytest.mark.slow
def test_dropout_is_on_what_adapters_read() -> None:
    batch, losses = make_batch(), []
    for rate, k in ((0.0, 1), (0.5, 1), (0.5, 4)):
        config = config_of(STILL, **LORA, lora_dropout=rate)
        assembly, state = state_of(config)
        numbers = run_numbers(config.training) | {"learning_rate": np.float32(1e-2)}
        _, metrics = assembly.jit_step(donate=False)(state, regroup(batch, k), numbers)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-4
    assert losses[1] == pytest.approx(losses[2], rel=1e-6), "masks belong to rows"


def test_state_is_of_what_is_trained() -> None:
    training = TrainingConfig(lora_rank=8, init_from="somewhere", batch_size=1)
    model = dataclasses.replace(STILL, d_model=256, d_ff=1024, vocab_size=4096)
    config = replace_fields(Config(model=model, training=training), {"data.max_length": 24})
    full = replace_fields(config, {"training.lora_rank": None, "training.init_from": None})
    sizes = []
    for each in (config, full):
        assembly = assemble(resolve(each, jax.devices()[:1]) if each is full else _resolved(each))
        sizes.append(assembly.layout.bytes_of_state(assembly.abstract_state))
    assert sizes[0] < 0.25 * sizes[1]
    state = assemble(_resolved(config)).abstract_state
    of_adapters = sum(x.size for path, x in flatten_dict(state.params, sep="/").items() if "adapter" in path)
    assert bytes_a_device(state.opt_state) == 2 * 4 * of_adapters + 4
    kinds = {path: str(x.dtype) for path, x in flatten_dict(state.params, sep="/").items()}
    assert kinds["blocks/mlp/up/kernel"] == kinds["token_embedding"] == "bfloat16"
    assert kinds["blocks/mlp/up/adapter/a"] == kinds["blocks/norm1/scale"] == "float32"


def _resolved(config: Config) -> Any:
    from jaxlm.parallel.mesh import make_mesh
    from jaxlm.train.assemble import Resolved

    return Resolved(config, make_mesh(jax.devices()[:1], (1, 1, 1)))


def test_parts_of_a_tree() -> None:
    tree = {"a": {"kernel": 1, "adapter": {"a": 2, "b": 3}}, "norm": {"scale": 4}}
    trained, frozen = divided(tree, TrainingConfig(lora_rank=1))
    assert (trained, frozen) == ({"a": {"adapter": {"a": 2, "b": 3}}}, {"a": {"kernel": 1}, "norm": {"scale": 4}})
    assert joined(trained, frozen) == joined(frozen, trained) == tree
    assert divided(tree, TrainingConfig(freeze=("norm", "a/kernel"))) == ({"a": {"adapter": {"a": 2, "b": 3}}}, frozen)
    assert divided(tree, TrainingConfig()) == (tree, {})


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    """The model that runs here start from."""
    folder = tmp_path_factory.mktemp("base")
    Trainer(make_config(folder, corpus)).train()
    return str(folder / "run" / "final_model")


HARD = {
    "training.lora_rank": 4,
    "training.lora_dropout": 0.1,
    "training.zero_stage": 2,
    "training.gradient_accumulation_steps": 2,
    "training.use_amp": True,
    "training.ema_decay": 0.9,
    "training.save_steps": 1,
}


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if "loss" in name or "norm" in name} for row in rows]


@pytest.mark.slow
def test_adapters_resume_bit_exactly(tmp_path: Path, corpus: Path, base: str) -> None:
    options = HARD | {"training.init_from": base}
    trainer_on(4, make_config(tmp_path / "whole", corpus, **options)).train()
    trainer_on(4, make_config(tmp_path, corpus, **options, **{"training.stop_at_step": 2})).train()
    again = trainer_on(4, make_config(tmp_path, corpus, **options))
    assert again.current_step == 2
    again.train()
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole" / "run")
    first, second = (load(folder / "run" / "final_model") for folder in (tmp_path, tmp_path / "whole"))
    for one, other in zip(*(jax.tree.leaves(nnx.state(x.model)) for x in (first, second)), strict=True):
        assert (one == other).all()
    own = flatten_dict(nnx.to_pure_dict(nnx.state(load(base).model)), sep="/")
    tuned = flatten_dict(nnx.to_pure_dict(nnx.state(first.model)), sep="/")
    for path, value in own.items():
        rounded = value.astype(jnp.bfloat16).astype(jnp.float32) if path.endswith(("kernel", "embedding")) else value
        assert (rounded == tuned[path]).all(), path
    assert float(jnp.abs(tuned["blocks/mlp/up/adapter/b"]).max()) > 0
    (text,) = [first.generate("the", max_new_tokens=3)]
    assert text.startswith("the")


def test_frozen_parameters_stay(tmp_path: Path, corpus: Path, base: str) -> None:
    options = {"training.init_from": base, "training.freeze": ("token_embedding", "blocks/attention", "blocks/*/bias")}
    trainer = Trainer(make_config(tmp_path, corpus, **options, **{"training.optimizer": "muon"}))
    before = flatten_dict(jax.device_get(trainer.state.params), sep="/")
    trainer.train()
    after = flatten_dict(jax.device_get(trainer.state.params), sep="/")
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {
        path for path in before if not path.startswith(("token", "blocks/attention")) and "bias" not in path
    } | {"final_norm/bias"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lora_rank": 4}, r"training\.lora_rank \(4\) adapts a model; name it with training\.init_from"),
        ({"lora_alpha": 4.0}, r"training\.lora_alpha \(4\.0\) has no use without training\.lora_rank"),
        (
            {"lora_rank": 4, "init_from": "X", "lora_targets": ("mlp/up", "mlp/gate")},
            r"lora_targets \(mlp/gate\) matches none of the layers: attention/out, attention/qkv, mlp/down, mlp/up",
        ),
        ({"lora_rank": 4, "init_from": "X", "freeze": ("mlp",)}, r"training\.freeze \(mlp\) has no use beside"),
        ({"lora_rank": 4, "init_from": "X", "lora_targets": ()}, r"training\.lora_targets \(\[\]\) leaves no layer"),
        ({"freeze": ("layers",)}, r"training\.freeze \(layers\) matches none of the parameters: blocks/attention"),
        ({"freeze": ("*",)}, r"training\.freeze \(\*\) leaves no parameter to train"),
    ],
)
def test_what_trains_nothing_is_refused(
    tmp_path: Path, corpus: Path, base: str, options: dict[str, Any], problem: str
) -> None:
    given = {f"training.{name}": base if value == "X" else value for name, value in options.items()}
    with pytest.raises(UserError, match=problem):
        Trainer(make_config(tmp_path, corpus, **given))


def test_adapters_are_merged_before_they_are_started_from(tmp_path: Path, corpus: Path, base: str) -> None:
    trainer = Trainer(make_config(tmp_path, corpus, **{"training.init_from": base, "training.lora_rank": 4}))
    trainer.train()
    tuned = str(tmp_path / "run" / "final_model")
    with pytest.raises(UserError, match="holds adapters beside its model.*jaxlm export"):
        Trainer(make_config(tmp_path / "next", corpus, **{"training.init_from": tuned}))
