"""Trains a language model: python scripts/train.py --config FILE [--SECTION.FIELD VALUE ...]"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("train")
