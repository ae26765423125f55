"""Two exports to one folder at once: the second is refused, and a killed one stands in nobody's way."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.export.errors import ExportError
from qtrain.export.lock import only_one

HOLD = """
import sys, time
from pathlib import Path
from qtrain.export.lock import only_one

with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "v2"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with (
                pytest.raises(ExportError, match=rf"v2: another export \(process {holder.pid}\)"),
                only_one(out),
            ):
                raise AssertionError("both hold it")
            with only_one(tmp_path / "deep" / "v3"):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with only_one(out):
        pass
    assert list(out.parent.iterdir()) == []


def test_an_error_lets_go_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), only_one(tmp_path / "out"):
        raise ValueError("no")
    with only_one(tmp_path / "out"):
        assert (tmp_path / "out.lock").is_file()
    assert list(tmp_path.iterdir()) == []
