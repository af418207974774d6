"""Packages import in one direction, and functions stay short enough to be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pag_fast

ROOT = Path(pag_fast.__file__).parent
ORDER = (
    ("version",),
    ("ops",),
    ("settings",),
    ("sharing",),
    ("perturbations",),
    ("config",),
    ("processors",),
    ("fusion",),
    ("models",),
    ("pipelines",),
    ("parallel",),
    ("runtime",),
    ("sag", "guiders"),
    ("mixins",),
    ("patching",),
    ("analysis",),
    ("",),  # the package itself, which shows what users touch
    ("tools",),
    ("cli_options",),
    ("cli_generate", "cli_counts"),
    ("cli",),
)
"""Each may import those in front of it, and nothing beside or behind it."""
PARTS_OF_RUNTIME = {
    "access": set(),
    "compatibility": set(),
    "compiled": {"access", "compatibility", "undoing"},
    "loops": {"access", "guidance"},
}
"""Folders in which no session is known, and what else of ``runtime`` they may import."""

MOST_LINES, MOST_BRANCHES, MOST_TOP_FILES = 60, 20, 12
_RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
_FILES = sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.parts)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """As ``ast.walk``, without what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not is_typing:
            yield node
            yield from _nodes(node)


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in _FILES}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, in functions too."""
    found, own = set(), _module_name(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            head = ".".join(
                [*(base if node.level else []), *([node.module] if node.module else [])]
            )
            names = [f"{head}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found - {own}


def _package(name: str) -> str:
    return (name.split(".") + [""])[1]


def _violations() -> set[tuple[str, str]]:
    found = set()
    for path in _FILES:
        own = _package(_module_name(path))
        for other in map(_package, imports(path)):
            if other != own and _RANK[other] >= _RANK[own]:
                found.add((path.relative_to(ROOT).as_posix(), other))
    return found


def test_every_package_has_a_place():
    assert {_package(_module_name(path)) for path in _FILES} == set(_RANK)


def test_packages_import_those_in_front_of_them():
    assert not _violations()


def test_parts_of_the_runtime_know_no_session():
    for part, allowed in PARTS_OF_RUNTIME.items():
        own = f"pag_fast.runtime.{part}"
        modules = [x for name, x in MODULES.items() if f"{name}.".startswith(f"{own}.")]
        found = {name.split(".")[2] for path in modules for name in imports(path)
                 if name.startswith("pag_fast.runtime.")}  # fmt: skip
        assert found - {part} == allowed


def test_modules_import_in_no_circle():
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert not [name for name in graph if name in _reached(graph, name)]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that one imports, and that those import, and so on."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def test_few_files_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= MOST_TOP_FILES


# ---- the size of functions ----


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in _FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                # methods of several classes of a file have one name
                yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}", node


def complexity(function: ast.AST) -> int:
    """One, and one more for each place where the way through a function parts (McCabe)."""
    total = 1
    for node in ast.walk(function):
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, ast.If | ast.IfExp | ast.For | ast.While | ast.ExceptHandler):
            total += 1
    return total


def _length(function: ast.FunctionDef) -> int:
    """Lines behind the signature and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short():
    long = {name: _length(node) for name, node in _functions() if _length(node) >= MOST_LINES}
    assert not long


def test_functions_are_simple():
    found = {name: complexity(node) for name, node in _functions()}
    assert not {name: count for name, count in found.items() if count >= MOST_BRANCHES}
