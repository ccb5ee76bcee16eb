"""What the product's own code never does, read from its syntax trees: run what it was given, unpickle, unpack."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [*(p for room in ("clip_train", "retrieval", "diffusion") for p in sorted((ROOT / room).rglob("*.py")))]
FILES.append(ROOT / "cli.py")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "ruamel", "code", "pty"}
MODULES |= {"xml", "lxml", "xmlrpc", "telnetlib", "ftplib", "requests", "httpx", "aiohttp", "jinja2", "mako", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
ATTRIBUTES = {"system", "popen", "extractall", "extract", "unpack_archive", "mktemp", "read_pickle", "to_pickle"}
ATTRIBUTES |= {"from_string", "unsafe_load", "loadTestsFromName", "posix_spawn", "posix_spawnp", "startfile"}
ATTRIBUTES |= {"create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"}
ATTRIBUTES |= {"FileSystemReader", "load_state_dict_from_url"}  # torch's: unpickle what is there
RUNNING = ("exec", "spawn")  # what these begin with in os: execv, execlpe, spawnl, ...
LOADS = {"torch": "torch.load", "dcp": "dcp.load", "torch.distributed.checkpoint": "dcp.load"}
FETCHING = {"urllib.request", "fsspec"}  # besides sockets: what opens addresses

# file -> what it may do all the same, and why
ALLOWED = {
    "clip_train/stream.py": {
        "subprocess",
        "shell=True",
        "urllib.request",
        "fsspec",
    },  # pipe: and --allow-http, asked for
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


def offences(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(what, line) of everything in a file that could run, unpickle, unpack or fetch what a stranger wrote."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                if top in MODULES | {"subprocess"} | FETCHING or name in FETCHING:
                    yield (name if name in FETCHING else top), node.lineno
            if isinstance(node, ast.ImportFrom):
                yield from ((what, node.lineno) for alias in node.names if (what := _under(node.module, alias.name)))
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _under(module: str | None, name: str) -> str:
    """What a name that is imported from a module would hide from _of_call; "" if nothing."""
    if name == "load":
        return LOADS.get(module or "", "")
    runs = name in ATTRIBUTES and module != "platform" or module == "os" and name.startswith(RUNNING)
    return name if runs else ""


def _of_call(node: ast.Call) -> Iterator[tuple[str, int]]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    of = getattr(getattr(node.func, "value", None), "id", "")
    given = {word.arg: getattr(word.value, "value", "?") for word in node.keywords}
    if isinstance(node.func, ast.Name) and name in CALLS or name in ATTRIBUTES and of != "platform":
        yield name, node.lineno
    if given.get("shell", False) is not False:
        yield "shell=True", node.lineno
    if of == "torch" and name == "load" and given.get("weights_only") is not True:
        yield "torch.load", node.lineno
    if of == "os" and name.startswith(RUNNING):
        yield name, node.lineno
    if of == "dcp" and name == "load" and "storage_reader" not in given:  # then torch's own, which unpickles
        yield "dcp.load", node.lineno
    if given.get("allow_pickle", False) is not False or given.get("trust_remote_code", False) is not False:
        yield "allow_pickle", node.lineno
    if of in ("tempfile", "os") and name in ("tempnam", "tmpnam"):
        yield name, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_was_given_is_run_unpickled_unpacked_or_fetched(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    found = [(what, line) for what, line in offences(parsed(path)) if what not in allowed]
    assert found == []


@pytest.mark.parametrize(
    "source, what",
    [
        ("import pickle", "pickle"),
        ("from yaml import load", "yaml"),
        ("eval(x)", "eval"),
        ("os.system(x)", "system"),
        ("subprocess.run(x, shell=True)", "shell=True"),
        ("torch.load(x)", "torch.load"),
        ("torch.load(x, weights_only=flag)", "torch.load"),
        ("np.load(x, allow_pickle=True)", "allow_pickle"),
        ("tar.extractall(x)", "extractall"),
        ("from urllib.request import urlopen", "urllib.request"),
        ("import subprocess", "subprocess"),
        ("os.execvp(x, y)", "execvp"),
        ("os.spawnl(0, x)", "spawnl"),
        ("os.posix_spawn(x, y, z)", "posix_spawn"),
        ("from os import execv, path", "execv"),
        ("from os import system", "system"),
        ("asyncio.create_subprocess_shell(x)", "create_subprocess_shell"),
        ("asyncio.create_subprocess_exec(x)", "create_subprocess_exec"),
        ("import runpy", "runpy"),
        ("from torch import load", "torch.load"),
        ("dcp.load(x)", "dcp.load"),
        ("dcp.load(x, storage_reader=dcp.FileSystemReader(y))", "FileSystemReader"),
        ("from torch.distributed.checkpoint import load", "dcp.load"),
    ],
)
def test_each_of_these_is_seen(source, what):
    assert what in [found for found, _ in offences(ast.parse(source))]
    fine = "re.compile(x); model.eval(); torch.load(x, weights_only=True); np.load(x); dcp.load(x, storage_reader=y)"
    assert not list(offences(ast.parse(f"{fine}; from platform import system; from json import load")))


def test_the_token_is_compared_in_constant_time_and_nowhere_else():
    compared = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                is_token = any(getattr(side, "attr", "") == "token" for side in sides)
                plainly = any(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops)
                if is_token and plainly:
                    compared.append((str(path.relative_to(ROOT)), node.lineno))
    assert compared == []
    door = (ROOT / "retrieval" / "door.py").read_text(encoding="utf-8")
    assert "hmac.compare_digest(given.strip(), self.token.encode())" in door


def test_every_promise_of_security_md_names_tests_that_are_there():
    paragraphs = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("Not promised")[0].split("\n\n")
    promises = [text for text in paragraphs if text.startswith("**")]
    assert len(promises) > 5
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", promise)
        assert named, promise
        for path, test in named:
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test
