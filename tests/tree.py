"""The source tree as `ast` sees it: modules, what they import, and their functions."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One Python file; a package's `__init__.py` has the package's name."""

    path: Path

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def lines(self) -> int:
        return len(self.path.read_text(encoding="utf-8").splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    def imports(self) -> list[str]:
        """Dotted names of modules of this tree and of others, wherever the import stands."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                full = [f"{base}.{alias.name}" for alias in node.names]
                names.update(name if _is_module(name) else base for name in full)
        return sorted(names)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        # one level is the module's own package
        package = self.path.parent.relative_to(ROOT).parts
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function with its qualified name, methods and nested ones included."""
        return _functions(self.tree, "")


def modules(folder: str) -> list[Module]:
    """Every Python file below a folder of the root; what a run left in an output folder does not count."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [Module(path) for path in paths if "output" not in path.relative_to(ROOT).parts]


def parameters(function: Function) -> list[str]:
    """Names of the parameters, `self` and `cls` left out."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    rest = [a.arg for a in (given.vararg, given.kwarg) if a is not None]
    return [*names, *(a.arg for a in given.kwonlyargs), *rest]


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last, blank lines and comments included."""
    first = function.body[1 if ast.get_docstring(function) is not None else 0]
    assert function.end_lineno is not None
    return function.end_lineno - first.lineno + 1


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if isinstance(child, Function):
            yield prefix + child.name, child
        yield from _functions(child, f"{prefix}{child.name}." if named else prefix)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
