"""A saved model as a folder that transformers opens: python scripts/export.py --model DIR --to DIR"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("export")
