"""The arrow of imports: retrieval -> clip_train <- diffusion; cli imports all, nothing imports cli."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "clip_train": {"clip_train"},
    "retrieval": {"retrieval", "clip_train"},
    "diffusion": {"diffusion", "clip_train"},
}
# Where the rooms meet: the whole loop, and the part of the server that draws.
EXCEPTIONS = {"diffusion/quickstart.py": {"retrieval"}, "retrieval/studio.py": {"diffusion"}}
OURS = {*ALLOWED, "cli"}
FILES = sorted(p for room in ALLOWED for p in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_import_follows_the_arrow(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[room] | EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), set())
    assert imported(path) & OURS <= allowed


def test_nothing_unpickles():
    for path in FILES + [ROOT / "cli.py"]:
        source = path.read_text()
        assert not {"pickle", "dill", "joblib", "shelve"} & imported(path), path
        assert "allow_pickle=True" not in source and "weights_only=False" not in source, path


def test_help_loads_neither_torch_nor_pandas():
    code = "import sys, cli; print([m for m in ('torch', 'pandas', 'faiss', 'numpy', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"
