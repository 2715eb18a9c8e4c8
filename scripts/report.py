"""The report of a run, or of several compared: python scripts/report.py RUN [RUN ...] [--out FILE]"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("report")
