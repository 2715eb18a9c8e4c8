"""Muon beside torch.optim.Muon, which orthogonalises in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.config import TrainingConfig
from jaxlm.train.optim import build_optimizer


def steps_of_both(momentum: float, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The updates of a matrix [inputs, outputs] by jaxlm and by PyTorch, for a learning rate of 1."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(24, 40)).astype(np.float32)
    config = dataclasses.replace(
        TrainingConfig(), optimizer="muon", muon_momentum=momentum, weight_decay=0.0, max_grad_norm=None
    )
    rule = build_optimizer(config)
    params = {"blocks": {"up": {"kernel": jnp.asarray(start)[None]}}, "token_embedding": jnp.zeros((2, 2))}
    state, update = rule.init(params), jax.jit(rule.update)
    theirs = torch.nn.Parameter(torch.tensor(start.T.copy()))
    muon = torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    found = []
    for _ in range(count):
        gradient = rng.normal(size=start.shape).astype(np.float32)
        updates, state = update({**params, "blocks": {"up": {"kernel": jnp.asarray(gradient)[None]}}}, state, params)
        before = theirs.detach().clone()
        theirs.grad = torch.tensor(gradient.T.copy())
        muon.step()
        found.append((np.asarray(updates["blocks"]["up"]["kernel"][0]), (before - theirs.detach()).numpy().T))
    return found


def difference(pair: tuple[np.ndarray, np.ndarray]) -> float:
    ours, theirs = pair
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_the_steps_are_torchs_but_for_the_momentums_beginning():
    """docs/recipes.md: optax corrects the bias of the average that begins at zero, PyTorch does not."""
    first, second, *_ = steps_of_both(0.95, 2)
    assert difference(first) < 0.02
    assert difference(second) > 0.04
    *_, late = steps_of_both(0.5, 20)
    assert difference(late) < 0.02
    with pytest.raises(AssertionError):  # the faults that this is for: another size, another direction
        assert difference((1.05 * late[0], late[1])) < 0.02
