"""What a run takes on GPUs that are not here: python scripts/plan.py --config FILE [--gpu NAME] [--devices N]"""

from jaxlm.__main__ import main

if __name__ == "__main__":
    main("plan")
