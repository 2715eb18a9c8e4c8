"""Text from a saved model: python scripts/generate.py --model DIR --prompt TEXT"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("generate")
