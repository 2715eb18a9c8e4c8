"""The Transformer: knows no mesh, no optimizer, no trainer."""

from jaxlm.model.transformer import Transformer

__all__ = ["Transformer"]
