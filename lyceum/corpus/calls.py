"""Who calls what: call sites in Python sources, counted by static analysis.

What: one pass over the syntax tree of each file; a call is credited to a real name by these rules, in this order.

1. The name before the first dot was imported in this file (`import x`, `import x as y`, `from x import y`, relative
   imports too): the import is followed, whatever else the name is bound to.
2. It is a function or class that this module itself defines at top level.
3. It is a builtin, and nothing in the file binds that name (a method of the same name does not hide it).
4. The call is a method call on something else: it goes to the builtin type that owns the attribute. str stands for
   bytes, list for tuple, set for frozenset. An attribute that several types still share (`pop`, `copy`, `index`, ...)
   is credited only where the receiver is a literal, or a variable that the file binds to one type's literals or
   constructor only; calls on `self`, `cls` and `super()` are methods of the library's own classes and not credited.

Decorators count as calls. Why: what a library calls most is what people ask about first. Not here: types of variables
beyond rule 4, dynamic dispatch, `getattr`; the counts are for ranking, not for proof.
"""

from __future__ import annotations

import ast
import builtins
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_"))


def _method_owners() -> dict[str, tuple[str, ...]]:
    """Attribute -> the builtin types that own it, twins folded: bytes into str, tuple into list, frozenset into set."""
    owners: dict[str, list[str]] = {}
    for kind in (str, list, dict, set, bytes, int, float):
        for name in dir(kind):
            if not name.startswith("_") and callable(getattr(kind, name)):
                if not (kind is bytes and "str" in owners.get(name, ())):
                    owners.setdefault(name, []).append(kind.__name__)
    return {name: tuple(kinds) for name, kinds in owners.items()}


METHOD_OWNERS = _method_owners()
_DISPLAYS: dict[type, str] = {
    ast.List: "list", ast.ListComp: "list", ast.Dict: "dict", ast.DictComp: "dict", ast.Set: "set", ast.SetComp: "set",
    ast.JoinedStr: "str",
}  # fmt: skip
_CONSTRUCTORS = frozenset(("str", "list", "dict", "set"))


@dataclass
class _File:
    """What one pass over a file finds; calls are resolved afterwards, when all imports are known."""

    imports: dict[str, str] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    bound: set[str] = field(default_factory=set)
    kinds: dict[str, str] = field(default_factory=dict)  # variable -> builtin type, "" where bindings disagree
    chains: list[tuple[str, ...]] = field(default_factory=list)  # ("os", "path", "join")
    methods: list[tuple[str, str]] = field(default_factory=list)  # (receiver's type if it is a literal, attribute)


@dataclass
class Calls:
    """What `count_calls` finds: call sites and calling files by public name, importing files by module name."""

    sites: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    imports: Counter[str] = field(default_factory=Counter)
    broken: int = 0  # files that did not parse


def count_calls(sources: Iterable[tuple[str, bool, str]], known: Mapping[str, str]) -> Calls:
    """Counts the calls of known names.

    Args:
        sources: (dotted module name, whether it is a package's `__init__`, source text) of each file.
        known: every dotted name under which an object can be reached -> its public name.
    """
    calls = Calls()
    with _no_collector():
        for module, is_package, text in sources:
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError):
                calls.broken += 1
                continue
            own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            found = _scan(tree, module if is_package else module.rpartition(".")[0])
            sites = Counter(_resolved(found, module, own, known))
            calls.sites.update(sites)
            calls.files.update(sites.keys())
            targets = set(found.imports.values())
            calls.imports.update(targets | {target.rpartition(".")[0] for target in targets} - {""})
    return calls


@contextmanager
def _no_collector() -> Iterator[None]:
    """Syntax trees are many small objects without cycles that matter: the collector only costs time (a third)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# The fields of each node class that can hold code; names, operators and contexts are not walked into.
_NO_CODE = frozenset(
    "ctx op ops attr id arg name names kind module level conversion simple is_async type_comment type_ignores".split()
)
_FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(name for name in kind._fields if name not in _NO_CODE)
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
}


def _scan(tree: ast.Module, package: str) -> _File:
    """One walk over a file's tree; written for speed (a million nodes in the standard library)."""
    found = _File()
    bound, load, fields = found.bound, ast.Load, _FIELDS
    methods: set[int] = set()  # function nodes that are methods: their names bind nothing outside the class
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        kind = node.__class__
        if kind is ast.Name:
            if node.ctx.__class__ is not load:
                bound.add(node.id)
            continue
        if kind is ast.Attribute:
            stack.append(node.value)
            continue
        if kind is ast.Call:
            _note_call(found, node.func)
        elif kind is ast.arg:
            bound.add(node.arg)
        elif kind is ast.Assign:
            _note_assignment(found, node)
        elif kind is ast.Import or kind is ast.ImportFrom:
            _note_import(found, node, package)
            continue
        elif kind is ast.FunctionDef or kind is ast.ClassDef or kind is ast.AsyncFunctionDef:
            if id(node) not in methods:
                bound.add(node.name)
            if kind is ast.ClassDef:
                methods.update([id(member) for member in node.body])
            for decorator in node.decorator_list:
                if decorator.__class__ is not ast.Call:
                    _note_call(found, decorator)
        elif kind is ast.ExceptHandler and node.name:
            bound.add(node.name)
        for name in fields.get(kind, ()):
            value = getattr(node, name)
            if value.__class__ is list:
                stack += value
            elif value is not None and value.__class__ in fields:
                stack.append(value)
    return found


def _note_call(found: _File, func: ast.expr) -> None:
    names: list[str] = []
    while isinstance(func, ast.Attribute):
        names.append(func.attr)
        func = func.value
    if isinstance(func, ast.Name):
        found.chains.append((func.id, *reversed(names)))
    elif names and not (isinstance(func, ast.Call) and isinstance(func.func, ast.Name) and func.func.id == "super"):
        found.methods.append((_kind_of(func) if len(names) == 1 else "", names[0]))


def _kind_of(node: ast.expr) -> str:
    """The builtin type of a literal or of a call of its constructor; "" if it is neither."""
    if isinstance(node, ast.Constant):
        return "str" if isinstance(node.value, (str, bytes)) else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CONSTRUCTORS:
        return node.func.id
    return _DISPLAYS.get(node.__class__, "")


def _note_assignment(found: _File, node: ast.Assign) -> None:
    kind = _kind_of(node.value)
    for target in node.targets:
        if isinstance(target, ast.Name):
            if not (isinstance(node.value, ast.Constant) and node.value.value is None):
                found.kinds[target.id] = kind if found.kinds.get(target.id, kind) == kind else ""


def _note_import(found: _File, node: ast.Import | ast.ImportFrom, package: str) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname:
                found.imports[alias.asname] = alias.name
            else:
                found.imports[alias.name.partition(".")[0]] = alias.name.partition(".")[0]
        return
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
    for alias in node.names:
        if alias.name == "*":
            found.stars.append(base)
        else:
            found.imports[alias.asname or alias.name] = f"{base}.{alias.name}"


def _resolved(found: _File, module: str, own: set[str], known: Mapping[str, str]) -> Iterator[str]:
    for root, *rest in found.chains:
        if root in found.imports:
            target = ".".join([found.imports[root], *rest])
            name = public_name(target, known)
            if name:
                yield name
            elif len(rest) > 1:
                yield from _method("", rest[-1])  # sys.path.append is a list's append
        elif root in own:
            name = public_name(".".join([module, root, *rest]), known)
            if name:
                yield name
        elif root in found.bound:
            if rest and root not in ("self", "cls") or len(rest) > 1:
                yield from _method(found.kinds.get(root, "") if len(rest) == 1 else "", rest[-1])
        elif root in _BUILTINS:
            name = public_name(".".join([root, *rest]), known)
            if name:
                yield name
        else:
            starred = (public_name(".".join([star, root, *rest]), known) for star in found.stars)
            yield from [name for name in starred if name][:1]
    for kind, attribute in found.methods:
        yield from _method(kind, attribute)


def public_name(target: str, known: Mapping[str, str]) -> str:
    """The public name of a dotted target, through an alias of the object or of the class it is a method of; else ""."""
    if target in known:
        return known[target]
    holder, _, leaf = target.rpartition(".")
    return known.get(f"{known[holder]}.{leaf}", "") if holder in known else ""


def _method(kind: str, attribute: str) -> Iterator[str]:
    owners = METHOD_OWNERS.get(attribute, ())
    if len(owners) == 1:
        yield f"{owners[0]}.{attribute}"
    elif kind in owners:
        yield f"{kind}.{attribute}"
