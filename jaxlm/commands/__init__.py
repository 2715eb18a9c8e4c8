"""One module for each command: a docstring that `--help` shows, `add_options(parser)` and `run(arguments)`.

None imports anything heavy before `run`, so that `--help` and mistakes come at once. `jaxlm/__main__.py` lists them.
"""
