"""Text from a model; `jaxlm.generation.api` is what users call."""
