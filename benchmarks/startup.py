"""How long a user waits before anything happens: imports and --help, and what they must not load.

    python benchmarks/startup.py

Wall time of a fresh process, best and median of several.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import publish

BIN = Path(sys.executable).parent
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import quantkit": [sys.executable, "-c", "import quantkit"],
    "import hwmodel": [sys.executable, "-c", "import hwmodel"],
    "quantkit --help": [BIN / "quantkit", "--help"],
    "hwmodel --help": [BIN / "hwmodel", "--help"],
    "import torch (for comparison)": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    """Measure and publish."""
    rows = []
    for name, command in COMMANDS.items():
        times = []
        for _ in range(9):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        rows.append({"command": name, "best_s": round(min(times), 3), "median_s": round(statistics.median(times), 3)})
    publish("startup", rows, packages=("typer", "rich"))


if __name__ == "__main__":
    main()
