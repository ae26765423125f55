"""The shape of the repository: who imports whom, what the wheel brings, what a folder's name breaks."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a room and the rooms of ours that it may import from
MAY_IMPORT = {
    "kernels": set(),
    "export": {"kernels"},
    "bench": {"export", "kernels"},
    "qtrain": {"export", "bench", "kernels"},
}
# scripts that run in a process of their own and measure the app; nothing imports them
MEASURE_THE_APP = {
    ROOT / "bench" / "workers" / name for name in ("ours.py", "quantize_ours.py", "export_memory.py")
}
ROOMS = [room for room in MAY_IMPORT if (ROOT / room).is_dir()]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "qtrain":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "export", "bench") else "qtrain"


@pytest.mark.parametrize("room", ROOMS)
def test_import_directions(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        if path in MEASURE_THE_APP:
            continue
        for module in _imports(path):
            target = _room_of(module)
            assert target is None or target == room or target in MAY_IMPORT[room], f"{path}: {module}"
            assert target != room or room == "qtrain", (
                f"{path}: inside a room imports are relative ({module})"
            )


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_imported_by_its_folders_name(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        assert not {module.split(".")[0] for module in _imports(path)} & {"kernels", "export", "bench"}, path


def test_importing_qtrain_imports_nothing_heavy() -> None:
    code = (
        "import sys, qtrain.cli, qtrain.kernels; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_transformers_models_import_from_the_repositorys_root() -> None:
    """There, `kernels` is our folder, and transformers looks for Hugging Face's package of that name."""
    code = (
        "from transformers.models.qwen2 import modeling_qwen2; from transformers import Trainer; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, so that building leaves nothing in the repository
    source = folder / "source"
    files = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_the_wheel_brings_one_top_level_name(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty environment: a folder `kernels` beside it would break transformers."""
    options = ["--quiet", "--no-deps", "--no-compile", "--target", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True
    )
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".dist-info"}
    assert names - {"bin"} == {"qtrain"}
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "import qtrain.kernels, qtrain.bench; print(qtrain.kernels.__file__)"
    )
    assert str(tmp_path) in subprocess.check_output(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, text=True
    )


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            inside = path.relative_to(ROOT / room)
            if (
                path.suffix in (".py", ".jsonl", ".j2", ".yaml", ".toml", ".typed")
                and "peers" not in inside.parts
            ):
                prefix = "qtrain" if room == "qtrain" else f"qtrain/{room}"
                assert f"{prefix}/{inside}" in names, path
