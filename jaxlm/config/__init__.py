"""The configuration of a run: its options, files and rules; imports nothing heavy."""

# ruff: noqa: F401

from jaxlm.config.fields import from_dict, nearest, plain, replace_fields, shown, to_dict, type_name, with_derived
from jaxlm.config.files import load_config, shipped_configs
from jaxlm.config.schema import SECTIONS, Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.config.unused import unused_options
from jaxlm.config.validate import check_fields, check_platform, check_steps, check_together, mesh_shape, validate
