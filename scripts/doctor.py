"""Says whether this machine can train: python scripts/doctor.py"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("doctor")
