"""A conversation with a saved model: python scripts/chat.py --model DIR"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("chat")
