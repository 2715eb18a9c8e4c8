"""`jaxlm.load`: a model to use, from whatever folder or name it is in."""

import os

import jax
from flax import nnx

from jaxlm.checkpoints.items import read_progress
from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import Config, DataConfig, TrainingConfig, replace_fields, validate
from jaxlm.config.fields import check_choice
from jaxlm.errors import UserError
from jaxlm.interop.pretrained import OwnFolder, Pretrained, open_model
from jaxlm.model import Transformer
from jaxlm.ops.attention_kernels import choose_ours, compute_capability
from jaxlm.parallel.processes import say
from jaxlm.train.assemble import abstract_model

DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | os.PathLike[str], model_class: type[Transformer] = Transformer, dtype: str | None = None
) -> LoadedModel:
    """The model, tokenizer and configuration of a saved model, on JAX's default device.

    Args:
      path: best_model, final_model or a checkpoint; a run's folder, for its best_model, else final_model, else newest
        checkpoint; a folder that transformers has saved; or the name of such a model on the Hub.
      model_class: a model of a class of your own needs that class.
      dtype: float32, bfloat16 or float16, what parameters are held and products computed in; None: parameters in
        float32, and products as in the run (of other models: in float32).

    Raises:
      UserError: there is no model, it is damaged, or of another class.
    """
    found, progress = open_model(os.fspath(path), os.fspath(path), DataConfig()), None
    if isinstance(found, OwnFolder):
        config, progress = found.config, read_progress(found.folder)
        if progress.model_class != model_class.__name__:
            own = progress.model_class
            difference = f"holds a {own}, not a {model_class.__name__}"
            raise UserError(f"{found.folder}: {difference}; from Python, load(path, {own}) opens it")
        if found.kind != OwnFolder.kind:
            say(f"{path}: its {found.folder.name}, of step {progress.step:,}")
    else:
        length = min(found.model.max_seq_len, DataConfig().max_length)
        training = TrainingConfig(init_from=os.fspath(path), use_amp=False)
        config = Config(found.model, training, DataConfig(max_length=length))
    if found.tokenizer is None:
        raise UserError(f"{path}: holds no tokenizer.json; write one there")
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
        kept = config.training.amp_dtype if dtype == "float32" else dtype
        config = replace_fields(config, {"training.use_amp": dtype != "float32", "training.amp_dtype": kept})
    model = _model(found, validate(config), model_class, dtype)
    return LoadedModel(model, found.tokenizer, config, progress, found.folder)


def _model(found: Pretrained, config: Config, model_class: type[Transformer], dtype: str | None) -> Transformer:
    device = jax.devices()[0]
    attention = choose_ours(config, compute_capability(device))  # cudnn can't do every prompt
    graphdef, abstract = nnx.split(abstract_model(config, attention, model_class))
    placed = jax.sharding.SingleDeviceSharding(device)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), nnx.to_pure_dict(abstract))
    found.check(target)
    params = found.params(target, target, shards=1)
    return nnx.merge(graphdef, params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params))
