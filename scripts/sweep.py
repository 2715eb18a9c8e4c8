"""A run for each point of a grid, compared: python scripts/sweep.py --config FILE --vary FIELD=VALUES ..."""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("sweep")
