"""Python packages as text: their sources, their documentation, and facts about the objects they call most.

What: the standard library of the running Python ("stdlib"), one of its modules ("json"), the builtins ("builtins") or
any installed package ("numpy"), read three ways: files, imported objects with their doc strings, and call sites.
Why: every reader has this text, and can check what an assistant says about it.

    survey = Survey(("stdlib",))
    facts = survey.studied(500)          # the objects the library itself calls most, that have a usable summary
    survey.names()                       # every real public name

Modules are imported to read their documentation: output is swallowed, warnings are off, one that cannot be imported is
counted in `survey.failures`. Never imported: what opens windows, prints, or touches the terminal on import, tests, and
names with a leading underscore (see the lists below). A stranger's package runs its own code when it is imported.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lyceum.corpus import docstrings
from lyceum.corpus.calls import Calls, count_calls
from lyceum.errors import DataError, did_you_mean

STDLIB = "stdlib"
# Tests, programs, installers, and two that would fill the counts: codec tables, and distutils, which is leaving Python
SKIPPED_FOLDERS = frozenset(
    "test tests idlelib lib2to3 turtledemo site-packages dist-packages pip ensurepip __pycache__ pydoc_data "
    "lib-dynload encodings distutils".split()
)
# antigravity opens a browser, this prints, readline touches the terminal, tkinter and turtle want a screen
SKIPPED_MODULES = frozenset(
    "antigravity this __phello__ __hello__ idlelib tkinter turtle turtledemo lib2to3 distutils ensurepip pip test "
    "tests pydoc_data readline rlcompleter encodings nt ntpath nturl2path msilib winreg winsound msvcrt sitecustomize "
    "usercustomize conftest setup".split()
)
# Modules that only hold other modules' objects: never a public name, but a call through them counts for the real one.
ALIAS_MODULES = frozenset("posix posixpath genericpath sre_compile sre_parse sre_constants".split())
# What people ask about first although the library seldom calls it: these rank as if 12 files called them. (What it
# calls often, such as len and os.path.join, needs no list.)
ASKED_FIRST_FILES = 12
ASKED_FIRST = frozenset(
    """
    bin complex csv datetime format json math oct pow random slice string asyncio.gather asyncio.run asyncio.sleep
    base64.b64decode bisect.bisect_left collections.OrderedDict dataclasses.dataclass datetime.date.today
    datetime.datetime.now decimal.Decimal dict.copy enum.Enum fractions.Fraction functools.reduce getpass.getpass
    glob.glob hashlib.md5 hashlib.sha256 heapq.heapify heapq.heappop heapq.heappush itertools.accumulate
    itertools.combinations itertools.groupby itertools.permutations itertools.product json.dump json.dumps json.load
    json.loads list.clear list.copy list.count list.index logging.basicConfig logging.info math.ceil math.cos math.exp
    math.factorial math.floor math.gcd math.isclose math.log math.pow math.prod math.sin math.sqrt operator.itemgetter
    os.path.getsize os.walk pathlib.Path.exists pathlib.Path.mkdir pathlib.Path.read_text pathlib.Path.write_text
    pickle.dump pickle.dumps pickle.load pickle.loads platform.system pprint.pprint queue.Queue random.choice
    random.choices random.randint random.random random.sample random.seed random.shuffle random.uniform re.fullmatch
    re.split secrets.token_hex set.clear set.difference set.intersection set.issubset set.pop set.union shutil.copy
    shutil.copytree shutil.move shutil.rmtree sqlite3.connect statistics.mean statistics.median statistics.mode
    statistics.stdev str.capitalize str.center str.count str.index str.isalpha str.islower str.isupper
    str.removeprefix str.removesuffix str.swapcase str.zfill string.Template subprocess.run
    tempfile.NamedTemporaryFile tempfile.TemporaryDirectory tempfile.mkdtemp textwrap.dedent textwrap.fill
    textwrap.indent textwrap.wrap time.perf_counter timeit.timeit unittest.TestCase urllib.request.urlopen uuid.uuid4
    zipfile.ZipFile
    """.split()
)
TRIVIAL_LEAVES = frozenset("main test demo".split())


@dataclass(frozen=True)
class ObjectFact:
    """What the corpus knows about one object; everything stands in its documentation, nothing is made up.

    `name` is the dotted name people type ("len", "str.join", "os.path.join"); `kind` is function, class, method,
    exception or module; `module` is "built-in" for builtins and their methods; `signature` is text such as
    "(obj, *, skipkeys=False)" or "" where Python does not tell; `parameters` are names without self; `returns` is a
    short phrase or ""; `summary` is one plain sentence; `doc` the cleaned doc string; `uses` counts call sites.
    """

    name: str
    kind: str
    module: str
    signature: str
    parameters: tuple[str, ...]
    returns: str
    summary: str
    doc: str
    uses: int
    package: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "parameters": list(self.parameters)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ObjectFact:
        return cls(**{**row, "parameters": tuple(row["parameters"])})


@dataclass(frozen=True)
class Module:
    """A module's dotted name and its source file; None for one written in C."""

    name: str
    file: Path | None
    is_package: bool = False


def find_modules(package: str) -> list[Module]:
    """All modules of a package, sorted by name, private and skipped ones included only as sources (see `is_public`).

    Raises: DataError if no such package is installed.
    """
    if package == STDLIB:
        folder = Path(sysconfig.get_paths()["stdlib"])
        found = {module.name: module for module in _walk(folder, "")}
        for name in sys.stdlib_module_names:
            found.setdefault(name, Module(name, None))
        found["os.path"] = Module("os.path", None)
        return [found[name] for name in sorted(found)]
    if package == "builtins":
        return [Module("builtins", None)]
    try:
        with _quiet():
            spec = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        hint = did_you_mean(package, [STDLIB, "builtins", *sys.stdlib_module_names])
        raise DataError(f"no package named {package!r} is installed", hint=f"{hint} (or install it with pip)")
    if spec.submodule_search_locations:
        found = {}
        for location in spec.submodule_search_locations:
            found |= {module.name: module for module in _walk(Path(location), package)}
        found.setdefault(package, Module(package, None, True))
        return [found[name] for name in sorted(found)]
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    return [Module(package, file)] + ([Module("os.path", None)] if package == "os" else [])


def _walk(folder: Path, package: str) -> Iterator[Module]:
    for at, folders, files in os.walk(folder):
        inside = Path(at).relative_to(folder).parts
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and name.isidentifier())
        for file in sorted(files):
            if file.endswith(".py") and file[:-3].isidentifier():
                is_package = file == "__init__.py"
                parts = [package, *inside] if is_package else [package, *inside, file[:-3]]
                name = ".".join(part for part in parts if part)
                if name:
                    yield Module(name, Path(at) / file, is_package)
            elif file.endswith((".so", ".pyd")) and package:
                yield Module(".".join([package, *inside, file.split(".")[0]]), None)


def is_public(name: str) -> bool:
    """True if no part of a dotted name is private and none of its modules is on the skip list."""
    parts = name.split(".")
    return (
        not any(part.startswith("_") or part in SKIPPED_FOLDERS for part in parts) and parts[0] not in SKIPPED_MODULES
    )


def read_source(file: Path) -> str | None:
    """A source file as text with "\\n" line ends; None if it is binary or not UTF-8."""
    data = file.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is printed and warned about while strangers' modules are imported goes nowhere."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


class Survey:
    """The objects of some packages under their public names, and how often the packages call them.

    Args:
        packages: "stdlib", "builtins", or names of installed packages.

    Raises: DataError if a package is not installed.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.modules = {package: find_modules(package) for package in dict.fromkeys(packages)}
        self.failures: dict[str, str] = {}  # module -> why it could not be imported
        self.objects: dict[str, Any] = {}  # public name -> object (modules too)
        self.package_of: dict[str, str] = {}
        self.known: dict[str, str] = {}  # every dotted name of an object -> its public name
        with _quiet():
            self._collect()

    def sources(self) -> Iterator[tuple[str, Module, str]]:
        """(package, module, text) of every source file; binary files and such that are not UTF-8 are left out."""
        for package, modules in self.modules.items():
            for module in modules:
                text = None if module.file is None else read_source(module.file)
                if text is not None:
                    yield package, module, text

    @cached_property
    def calls(self) -> Calls:
        """Call sites in the packages' own sources."""
        files = ((module.name, module.is_package, text) for _, module, text in self.sources())
        return count_calls(files, self.known)

    def uses(self, name: str) -> int:
        """Call sites of an object; for a module, the files that import it."""
        return (self.calls.imports if inspect.ismodule(self.objects[name]) else self.calls.sites)[name]

    def _rank(self, name: str) -> tuple[int, int, str]:
        """Called from most files first (one file's habit decides nothing), then most call sites, then by name.

        Four files that import a module count as one: whoever calls a function has imported its module before.
        """
        files = self.calls.files[name]
        if inspect.ismodule(self.objects[name]):
            files = self.calls.imports[name] // 4
        if name in ASKED_FIRST:
            files = max(files, ASKED_FIRST_FILES)
        return (-files, -self.uses(name), name)

    def studied(self, limit: int) -> list[ObjectFact]:
        """At most `limit` facts, called from most files first, of objects with a usable one-sentence summary."""
        facts: list[ObjectFact] = []
        for name in sorted(self.objects, key=self._rank):
            if len(facts) >= limit:
                break
            with _quiet():
                fact = describe(name, self.objects[name], self.package_of[name], self.uses(name))
            if fact is not None:
                facts.append(fact)
        return facts

    def names(self) -> list[str]:
        """Every real public dotted name, sorted."""
        return sorted(name for name in self.objects if name.rpartition(".")[2] not in TRIVIAL_LEAVES)

    # ---- collecting

    def _collect(self) -> None:
        names: dict[int, list[str]] = {}  # id of an object -> dotted names it is reached by
        held: dict[int, tuple[Any, str]] = {}  # keeps the object alive, so that its id stays its own
        public: set[str] = set()
        for package, modules in self.modules.items():
            wanted = [module.name for module in modules if is_public(module.name)]
            for module_name in (["builtins"] if package == STDLIB else []) + wanted:
                module = self._import(module_name)
                if module is None:
                    continue
                if module_name not in ALIAS_MODULES and module_name != "builtins":
                    self._add(module_name, module, package)
                exported = _exported(module)
                for leaf, value in sorted(vars(module).items(), key=lambda item: item[0]):
                    if leaf.startswith("_") or not _is_object(value):
                        continue
                    name = leaf if module_name == "builtins" else f"{module_name}.{leaf}"
                    names.setdefault(id(value), []).append(name)
                    held.setdefault(id(value), (value, package))
                    if leaf in exported and module_name not in ALIAS_MODULES:
                        public.add(name)
        for key, candidates in names.items():
            value, package = held[key]
            choices = [name for name in candidates if name in public]
            if choices:
                best = min(choices, key=lambda name: _preference(name, value))
                self._add(best, value, package)
                self.known.update(dict.fromkeys(candidates, best))
        for name, value in list(self.objects.items()):
            if inspect.isclass(value):
                for leaf, method in _methods(value):
                    self._add(f"{name}.{leaf}", method, self.package_of[name])

    def _import(self, name: str) -> types.ModuleType | None:
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything
            self.failures[name] = f"{type(error).__name__}: {error}"
            return None

    def _add(self, name: str, value: Any, package: str) -> None:
        if name not in self.objects:
            self.objects[name] = value
            self.package_of[name] = package
            self.known[name] = name


def _is_object(value: Any) -> bool:
    """True for functions, classes and callable objects with a name (numpy's ufuncs), not for modules and constants."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return True
    return callable(value) and isinstance(getattr(value, "__name__", None), str) and not inspect.ismodule(value)


def _exported(module: types.ModuleType) -> frozenset[str]:
    """The names a module offers: `__all__`, or else the objects that it (or its C twin) defines."""
    if module is builtins:
        return frozenset(vars(module))
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return frozenset(name for name in listed if isinstance(name, str))
    homes = (module.__name__, None, "_" + module.__name__, module.__name__.rpartition(".")[2])
    return frozenset(name for name, value in vars(module).items() if getattr(value, "__module__", None) in homes)


def _preference(name: str, value: Any) -> tuple[Any, ...]:
    """Sorts the names of one object: its own last name, few dots, the module it says it is from, short, by letter."""
    holder, _, leaf = name.rpartition(".")
    return (
        leaf != getattr(value, "__name__", leaf),
        name.count(".") - (holder == "os.path"),
        holder != getattr(value, "__module__", None),
        len(name),
        name,
    )


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods a class defines itself or takes from a private base class (`argparse._ActionsContainer`)."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is kind or (base.__name__.startswith("_") and base is not object):
            for leaf, value in vars(base).items():
                if leaf.startswith("_") or leaf in seen:
                    continue
                seen.add(leaf)
                if inspect.isroutine(_unwrapped(value)):
                    yield leaf, value


def describe(name: str, value: Any, package: str, uses: int) -> ObjectFact | None:
    """The fact about one object, or None if its doc string has no usable first sentence."""
    holder, _, leaf = name.rpartition(".")
    inner = _unwrapped(value)
    try:
        doc = value.__doc__ if inspect.isclass(value) else inspect.getdoc(inner)
        doc = inspect.cleandoc(doc) if isinstance(doc, str) else ""
    except Exception:  # a stranger's __doc__ may be a property that raises
        doc = ""
    parsed = docstrings.split_signature(doc, (leaf, getattr(inner, "__name__", leaf)))
    summary = docstrings.summary(parsed.body, parsed.result)
    if not summary:
        return None
    kind = _kind(value, inner, holder)
    signature = "" if kind == "module" else _signature(value, kind) or parsed.signature
    body = docstrings.clean_body(parsed.body)
    told = kind in ("function", "method") or summary.startswith("Return")
    return ObjectFact(
        name=name,
        kind=kind,
        module=_module(name, kind, package),
        signature=signature,
        parameters=docstrings.parameter_names(signature),
        returns=docstrings.returns(summary, body, parsed.result) if told else "",
        summary=summary,
        doc=body or summary,
        uses=uses,
        package=package,
    )


def _unwrapped(value: Any) -> Any:
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _kind(value: Any, inner: Any, holder: str) -> str:
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    owner = holder.rpartition(".")[2]
    is_method = bool(holder) and (owner[:1].isupper() or isinstance(getattr(builtins, holder, None), type))
    is_method = is_method or isinstance(value, (staticmethod, classmethod)) or inspect.ismethoddescriptor(inner)
    return "method" if is_method else "function"


def _module(name: str, kind: str, package: str) -> str:
    """The module part of a dotted name; "built-in" for builtins and their methods."""
    if kind == "module":
        return name
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:size]) in sys.modules and not hasattr(builtins, parts[0]):
            return ".".join(parts[:size])
    return "built-in"


def _signature(value: Any, kind: str) -> str:
    """`inspect.signature` as text without annotations and self; "" where Python does not know it."""
    try:
        signature = inspect.signature(_unwrapped(value))
        parameters = list(signature.parameters.values())
        if kind == "method" and not isinstance(value, staticmethod) and parameters:
            parameters = parameters[1:]
        parameters = [parameter for parameter in parameters if not parameter.name.startswith("_")]  # not for callers
        shown = [parameter.replace(annotation=parameter.empty, default=_default(parameter)) for parameter in parameters]
        return str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))
    except Exception:  # no signature, or a default whose repr raises
        return ""


class _Shown:
    """A default value that prints as given."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _default(parameter: inspect.Parameter) -> Any:
    """The default, or "..." where its text is long, changes from run to run, or is no Python."""
    if parameter.default is parameter.empty:
        return parameter.empty
    if isinstance(parameter.default, type):
        return _Shown(parameter.default.__name__)
    text = repr(parameter.default)
    unstable = " at 0x" in text or "<" in text or isinstance(parameter.default, (set, frozenset))
    return _Shown("..." if unstable or len(text) > 30 or os.sep in text.strip("'\"")[1:] else text)


def studied_objects(packages: Sequence[str], limit: int) -> list[ObjectFact]:
    """The objects that the packages call most, with usable summaries; see `Survey.studied`."""
    return Survey(packages).studied(limit)


def all_names(packages: Sequence[str]) -> list[str]:
    """Every real public dotted name of the packages, sorted; see `Survey.names`."""
    return Survey(packages).names()


def exists(name: str) -> bool:
    """True if a dotted name is real here and now: a module, or an attribute reached from one, or from the builtins.

    Attributes that a class inherits count too (`collections.Counter.keys`), so this knows more names than `all_names`.
    """
    parts = name.split(".")
    with _quiet():
        for size in range(len(parts), -1, -1):
            if size and not is_public(".".join(parts[:size])):
                return False
            try:
                value: Any = importlib.import_module(".".join(parts[:size])) if size else builtins
                for part in parts[size:]:
                    value = getattr(value, part)
                return True
            except (Exception, SystemExit):
                continue
    return False
