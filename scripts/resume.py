"""Goes on with a run: python scripts/resume.py RUN [--allow_change FIELD,...] [--SECTION.FIELD VALUE ...]"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("resume")
