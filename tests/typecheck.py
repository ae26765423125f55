"""mypy over the rooms as they are imported.

mypy finds packages by folder, and the folders `kernels/` and `bench/` are imported as `qtrain.kernels`
and `qtrain.bench`: so it is shown a folder of links that has that shape.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS_BESIDE = ("kernels", "export", "bench")


def main() -> int:
    """Run mypy; returns its exit code."""
    tree = ROOT / ".cache" / "typecheck"
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "qtrain"
    package.mkdir(parents=True)
    for path in (ROOT / "qtrain").iterdir():
        (package / path.name).symlink_to(path)
    for room in ROOMS_BESIDE:
        if (ROOT / room).is_dir():
            (package / room).symlink_to(ROOT / room)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".cache" / "mypy"), "-p", "qtrain"]
    return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
