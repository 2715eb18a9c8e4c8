"""How text is made, from the options down to the key-value cache; `jaxlm.generate` is the way in."""
