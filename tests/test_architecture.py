"""The rules of the house that a machine can check: who may import whom, what an import may cost, how long a file is."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "memory": {"memory"},
    "agent": {"agent", "memory"},
    "distill": {"distill", "agent", "memory"},
    "evals": {"evals", "agent", "memory"},
    "serve": {"serve", "distill", "evals", "agent", "memory"},
}
"""Room -> the rooms it may import. distill and evals are siblings that do not know of each other."""

LEDGER_ROOMS = {"memory", "serve"}
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "vllm",
    "chromadb",
    "litellm",
    "langgraph",
    "matplotlib",
    "reasoning_gym",
    "wordllama",
    "sentence_transformers",
}
"""Imported inside functions only: a command that needs none of them starts without them."""

RUN_BY_ALEMBIC = ROOT / "memory" / "migrations"
"""Scripts, not modules: Alembic executes them on its own connection."""

REGISTRATIONS = {("memory/schema.py", "Index"), ("serve/cli.py", "app.add_typer")}
"""Calls that may stand alone at a module's top: SQLAlchemy attaches an index to its table that way, Typer a group of
commands to its parent."""

FORBIDDEN_AT_IMPORT = (
    "print",
    "open",
    "input",
    "os.environ",
    "os.getenv",
    "os.putenv",
    "os.makedirs",
    "os.mkdir",
    "os.chdir",
    "sys.path",
    "logging.basicConfig",
    "logging.config",
    "warnings.filterwarnings",
    "subprocess",
    "asyncio.run",
    "load_dotenv",
)
MAX_LINES = 500


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms or MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything that a file imports, at the top or inside a function."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{whole}.{alias.name}") for alias in node.names)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name(path)}:{line} imports {target}"
        for room, allowed in MAY_IMPORT.items()
        for path in sources(room)
        for line, target in imported(path)
        if (top := target.split(".")[0]) in {*MAY_IMPORT, "tests"} and top not in allowed
    ]
    assert wrong == []


def test_only_memory_and_serve_touch_the_ledger() -> None:
    wrong = [
        f"{name(path)}:{line} imports {target}"
        for room in MAY_IMPORT.keys() - LEDGER_ROOMS
        for path in sources(room)
        for line, target in imported(path)
        if target == "memory.ledger" or target.startswith("memory.ledger.")
    ]
    assert wrong == []


IMPORT_ALL = """
import importlib, json, os, sys

before = dict(os.environ)
failed = {}
for module in json.load(sys.stdin):
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = f"{type(error).__name__}: {error}"
changed = sorted(k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k))
print(json.dumps({"failed": failed, "loaded": sorted(sys.modules), "changed": changed}))
"""


def test_importing_every_module_is_light_and_leaves_no_trace(tmp_path: Path) -> None:
    modules = [module_name(path) for path in sources() if RUN_BY_ALEMBIC not in path.parents]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        input=json.dumps(modules),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["failed"] == {}
    assert set(result["loaded"]) & HEAVY == set()
    assert result["changed"] == [], "an import changed the environment"
    assert list(tmp_path.iterdir()) == [], "an import made files"
    assert done.stderr == ""


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not what stands in functions, nor under a main guard."""
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        inner: list[ast.expr] = [*defaults, *([] if isinstance(node, ast.Lambda) else node.decorator_list)]
    else:
        yield node
        inner = list(ast.iter_child_nodes(node))  # type: ignore[arg-type]
    for child in inner:
        yield from at_import(child)


@pytest.mark.parametrize("path", [p for p in sources() if RUN_BY_ALEMBIC not in p.parents], ids=name)
def test_a_module_does_no_work_when_it_is_imported(path: Path) -> None:
    wrong: list[str] = []
    for node in at_import(tree(path)):
        if isinstance(node, ast.Call | ast.Attribute):
            said = ast.unparse(node.func if isinstance(node, ast.Call) else node)
            if said.split(".")[-1] in ("mkdir", "touch", "write_text", "write_bytes") or any(
                said == word or said.startswith(f"{word}.") for word in FORBIDDEN_AT_IMPORT
            ):
                wrong.append(f"line {getattr(node, 'lineno', '?')}: {said}")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            said = ast.unparse(node.value.func)
            if (name(path), said) not in REGISTRATIONS:
                wrong.append(f"line {node.lineno}: {said}(...) stands alone")
    assert wrong == []


def test_no_file_is_longer_than_one_can_hold_in_mind() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*MAY_IMPORT, "tests")}
    assert {path: lines for path, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_every_room_says_what_it_is_and_every_module_what_it_owns() -> None:
    silent = [
        name(path)
        for path in sources()
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_the_tests_mirror_the_rooms() -> None:
    tests = ROOT / "tests"
    top = {path.name for path in tests.glob("test_*.py")}
    assert top == {Path(__file__).name}, "a test of a room belongs into tests/<room>/"
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."}
    assert folders == set(MAY_IMPORT)
    assert [room for room in folders if not (tests / room / "__init__.py").exists()] == []


@pytest.mark.parametrize("room", [*MAY_IMPORT, "tests"])
def test_a_rooms_name_means_the_folder_of_this_repository(room: str) -> None:
    spec = importlib.util.find_spec(room)
    assert spec is not None
    assert spec.origin == str(ROOT / room / "__init__.py")
