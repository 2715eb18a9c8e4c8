"""Predicted beside measured: python benchmarks/gpu/predicted.py benchmarks/results/gpu_*.json

For each cell of speed that suite.py measured of jaxlm, what `jaxlm plan` says of this checkout's update on that GPU. It
needs no GPU, but the compiler for it (the extra "plan"): for the machine that the file was brought home to.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib

from lib.gpu_tables import speed_setting
from lib.report import markdown
from ours import configuration
from speed import Cell, cell_spec

from jaxlm.errors import UserError
from jaxlm.parallel.gpus import gpu_of
from jaxlm.plan.plan import plan


def predicted(result: dict[str, Any], gpu: str) -> float:
    """tokens/s of the update of a measured cell.

    Raises:
      UserError: there is no plan for the GPU, or no compiler.
    """
    overrides = tuple(result["overrides"].items())
    cell = Cell(result["model"], (), result["packed"], result["dropout"], result["remat"], overrides)
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "cut": False,
            "rows": {cell.model: result["rows"]},
            "text": None,
            "cache_dir": folder,
            "platform": "cuda",
        }
        spec = cell_spec(spec, cell, Path(folder)) | {"contender": "ours"}
        spec["shape"] = spec["shape"] | {"vocab_size": result["vocab_size"]}
        return plan(configuration(spec), gpu_of(gpu) or gpu).tokens_per_second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of suite.py")
    rows = []
    for file in parser.parse_args().files:
        content = json.loads(file.read_text())
        if content["benchmark"] == "gpu-cut" or content["gpu"] is None:
            parser.error(f"{file}: was cut down, and says nothing of a GPU")
        measured = [x for x in content["results"] if x.get("contender") == "ours" and "tokens_per_second" in x]
        for result in measured:
            try:
                found = predicted(result, content["gpu"]["name"])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            rate = result["tokens_per_second"]["median"]
            about = [content["date"][:10], content["gpu"]["name"], speed_setting(result)]
            rows.append([*about, f"{rate:,.0f}", f"{found:,.0f}", f"{found / rate:.2f} x"])
    print(markdown(["measured", "on", "cell", ">tokens/s", ">predicted for this checkout", ">of it"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
