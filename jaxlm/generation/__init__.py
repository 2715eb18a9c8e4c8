"""How text is made, from the options down to the key-value cache; `jaxlm.generation.api` is the way in."""
