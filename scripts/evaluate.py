"""Held-out loss of a saved model: python scripts/evaluate.py --model DIR [--data.FIELD VALUE ...]"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("evaluate")
