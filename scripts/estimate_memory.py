"""Memory a GPU of a run, without one: python scripts/estimate_memory.py --config FILE [--devices N] [--gpu NAME]"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("estimate_memory")
