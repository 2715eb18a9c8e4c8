"""The parameters of a model as the tensors of a `Family` of transformers, both ways.

A parameter is named by its path, such as "blocks/mlp/up/kernel"; those of the blocks have a leading layer axis.
Shapes: I inputs and O outputs of a linear layer, N tensors that jaxlm holds as one parameter.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from jaxlm.interop.families import Family


def tensor_names(path: str, family: Family, layer: int | None) -> list[str]:
    """The N tensors that make up the parameter at `path`, in one layer; KeyError: the class has no such parameter."""
    module, _, leaf = path.rpartition("/")
    if not module:  # an embedding is a parameter of its own here, and a module in transformers
        module, leaf = path, "weight"
    names = [name.format(layer) for name in family.modules[module].split()]
    kind = "bias" if leaf == "bias" else "weight"
    return [f"{'' if name == 'lm_head' else family.prefix}{name}.{kind}" for name in names]


def _split(x: np.ndarray, path: str, n: int, family: Family) -> list[np.ndarray]:
    """The `n` tensors of one layer's parameter, as views where that is possible."""
    is_kernel = path.endswith("/kernel")
    parts = [x[..., i, :] for i in range(n)] if n > 1 else [x]
    if is_kernel:  # one tensor may hold several matrices: [I, N, O] -> [I, N * O]
        parts = [part.reshape(part.shape[0], -1) for part in parts]
    elif path.startswith("blocks/"):
        parts = [part.reshape(-1) for part in parts]
    return [part.T for part in parts] if is_kernel and family.transposed else parts


def to_tensors(params: Mapping[str, np.ndarray], family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for all parameters, in their dtype; KeyError: the class has no such parameter."""
    for path, x in params.items():
        layers: Iterable[tuple[int | None, np.ndarray]] = enumerate(x) if path.startswith("blocks/") else [(None, x)]
        for layer, part in layers:
            names = tensor_names(path, family, layer)
            yield from zip(names, _split(part, path, len(names), family), strict=True)


def from_tensors(path: str, shape: tuple[int, ...], family: Family, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter at `path`, float32 of `shape`, from the tensors that `read` returns by name."""
    x = np.empty(shape, np.float32)
    for name, view in to_tensors({path: x}, family):
        view[...] = read(name)  # into `x`: no reshaping or transposing of a contiguous array copies
    return x
