"""The configuration of a run: its options, files and rules; imports nothing heavy."""

from jaxlm.config.fields import (
    changed_fields,
    excerpt,
    from_dict,
    nearest,
    plain,
    replace_fields,
    shown,
    to_dict,
    type_name,
    with_derived,
)
from jaxlm.config.files import load_config, shipped_configs
from jaxlm.config.schema import SECTIONS, Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.config.validate import (
    check_fields,
    check_platform,
    check_steps,
    check_together,
    mesh_shape,
    profiled_steps,
    validate,
    xla_option,
)

__all__ = [
    "SECTIONS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainingConfig",
    "changed_fields",
    "check_fields",
    "check_platform",
    "check_steps",
    "check_together",
    "excerpt",
    "from_dict",
    "load_config",
    "mesh_shape",
    "nearest",
    "plain",
    "profiled_steps",
    "replace_fields",
    "shipped_configs",
    "shown",
    "to_dict",
    "type_name",
    "validate",
    "with_derived",
    "xla_option",
]
