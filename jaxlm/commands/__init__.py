"""A module a command: its docstring describes it, `add_options(parser)` and `run(arguments)` are it.

They import nothing heavy before `run`, so that `--help` and mistakes come at once. `jaxlm/__main__.py` lists them.
"""
