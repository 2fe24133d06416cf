from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lyceum.corpus import packages
from lyceum.corpus.packages import ObjectFact, Survey, all_names, describe, exists, find_modules, studied_objects
from lyceum.errors import DataError

SMALL = ("json", "textwrap")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package written for these tests: private parts, aliases, a module that cannot be imported, one that prints."""
    folder = tmp_path_factory.mktemp("installed")
    files = {
        "shop/__init__.py": '"""A small shop."""\nfrom shop.core import Till, sell\n__all__ = ["Till", "sell"]\n',
        "shop/core.py": '''
"""The core of the shop."""
class _Base:
    def open(self, key):
        """Open the till with a key."""
class Till(_Base):
    """A till for coins."""
    def pay(self, coins, *, tip=0.5):
        """Pay with coins and return the change."""
    @staticmethod
    def count(coins): "Return the number of coins."
    @classmethod
    def empty(cls): "Make a till without coins."
    def secret(self): pass
    def _hidden(self): "Hide all the coins."
def sell(item, _cache={}, sep=object(), *rest, **more):
    """Sell an item.

    Longer text about selling.
    """
class ShopError(Exception):
    """Something in the shop went wrong."""
def _private(): "Nobody should see this one."
def undocumented(): pass
def main(): "Run the whole shop."
''',
        "shop/noisy.py": 'import sys, warnings\nprint("noise")\nsys.stderr.write("noise")\nwarnings.warn("noise")\n',
        "shop/broken.py": "import no_such_module_anywhere\n",
        "shop/quits.py": "raise SystemExit(3)\n",
        "shop/use.py": "from . import sell\nfrom .core import Till\nsell(1)\nsell(2)\nTill().pay(3)\nTill.count([])\n",
        "shop/use_too.py": "import shop\nshop.sell(1)\n",
        "shop/tests/test_shop.py": "from shop import Till\nTill(); Till(); Till()\n",
        "shop/latin.py": "X = 'caf\xe9'\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode("latin-1"))
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "shop"]:
            del sys.modules[name]


@pytest.fixture
def survey(shop: Path) -> Survey:
    return Survey(("shop",))


def test_public_names_are_found_and_private_ones_are_not(survey: Survey) -> None:
    assert survey.names() == [
        "shop", "shop.Till", "shop.Till.count", "shop.Till.empty", "shop.Till.open", "shop.Till.pay",
        "shop.Till.secret", "shop.core", "shop.core.ShopError", "shop.core.undocumented", "shop.noisy", "shop.sell",
        "shop.use", "shop.use_too",
    ]  # fmt: skip


def test_modules_that_fail_are_counted_and_nothing_reaches_the_terminal(
    shop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    survey = Survey(("shop",))
    assert set(survey.failures) == {"shop.broken", "shop.quits", "shop.latin"}
    assert "no_such_module_anywhere" in survey.failures["shop.broken"]
    assert capfd.readouterr() == ("", "")


def test_the_most_called_objects_come_first_and_need_a_summary(survey: Survey) -> None:
    facts = survey.studied(100)
    assert [(fact.name, fact.uses) for fact in facts[:2]] == [("shop.sell", 3), ("shop.Till", 1)]
    assert [fact.name for fact in facts if "undocumented" in fact.name or "secret" in fact.name] == []
    assert survey.studied(3) == facts[:3]


def test_facts_say_what_the_documentation_says(survey: Survey) -> None:
    facts = {fact.name: fact for fact in survey.studied(100)}
    sell = facts["shop.sell"]
    assert (sell.kind, sell.module, sell.package) == ("function", "shop", "shop")
    assert sell.signature == "(item, sep=..., *rest, **more)"  # no private parameter, no address in a default
    assert sell.parameters == ("item", "sep", "rest", "more")
    assert (sell.summary, sell.doc) == ("Sell an item.", "Sell an item.\n\nLonger text about selling.")
    pay = facts["shop.Till.pay"]
    assert (pay.kind, pay.module, pay.signature, pay.returns) == ("method", "shop", "(coins, *, tip=0.5)", "the change")
    assert (facts["shop.Till.count"].kind, facts["shop.Till.count"].parameters) == ("method", ("coins",))
    assert (facts["shop.Till.empty"].kind, facts["shop.Till.empty"].signature) == ("method", "()")
    assert (facts["shop.core.ShopError"].kind, facts["shop.Till"].kind) == ("exception", "class")
    assert (facts["shop"].kind, facts["shop"].summary, facts["shop"].signature) == ("module", "A small shop.", "")


def test_facts_survive_the_round_trip_through_json(survey: Survey) -> None:
    for fact in survey.studied(100):
        assert ObjectFact.from_json(json.loads(json.dumps(fact.to_json()))) == fact


def test_one_object_has_one_public_name() -> None:
    survey = Survey(("stdlib",))
    assert survey.known["posixpath.join"] == survey.known["os.path.join"] == "os.path.join"
    assert survey.known["json.decoder.JSONDecoder"] == "json.JSONDecoder"
    assert survey.known["io.open"] == "open"
    assert survey.known["IOError"] == "OSError"
    for name in (
        "collections.Counter",
        "datetime.datetime.now",
        "functools.reduce",
        "argparse.ArgumentParser.add_argument",
    ):
        assert survey.known[name] == name
    assert not {"antigravity", "this", "tkinter", "posixpath.join", "ntpath.join"} & set(survey.names())


def test_every_name_is_real() -> None:
    assert [name for name in all_names((*SMALL, "builtins", "math")) if not exists(name)] == []


@pytest.mark.parametrize(
    "name", ["json.parse", "os.listdirs", "str.reverse", "nothing", "os.path.", "antigravity.geohash"]
)
def test_names_that_are_not_real_do_not_exist(name: str) -> None:
    assert not exists(name)


@pytest.mark.parametrize("name", ["len", "str.join", "json", "json.dumps", "collections.Counter.keys", "os.path.join"])
def test_real_names_exist_inherited_ones_too(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("len", len, ("function", "built-in", "(obj, /)", ("obj",), "the number of items in a container")),
        ("str.join", str.join, ("method", "built-in", "(iterable, /)", ("iterable",), "")),
        ("math.sqrt", __import__("math").sqrt, ("function", "math", "(x, /)", ("x",), "the square root of x")),
        ("KeyError", KeyError, ("exception", "built-in", "", (), "")),
    ],
)
def test_builtins_and_c_modules_are_described(name: str, value: object, expected: tuple[object, ...]) -> None:
    fact = describe(name, value, "stdlib", 1)
    assert fact is not None
    assert (fact.kind, fact.module, fact.signature, fact.parameters, fact.returns) == expected


def test_an_unknown_package_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match="'jsno'") as caught:
        find_modules("jsno")
    assert "json" in caught.value.hint


def test_the_survey_is_the_same_with_another_hash_seed() -> None:
    program = (
        "import json\nfrom lyceum.corpus.packages import Survey\ns = Survey(('json', 'textwrap', 'enum'))\n"
        "print(json.dumps([[f.to_json() for f in s.studied(80)], s.names(), sorted(s.known.items())]))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, check=True, env={**packages.os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1]
    assert len(json.loads(said[0])[0]) > 20


@pytest.mark.slow
def test_the_whole_standard_library_is_read_in_seconds_and_holds_what_people_ask_first() -> None:
    start = time.process_time()
    facts = {fact.name: fact for fact in studied_objects(("stdlib",), 500)}
    assert time.process_time() - start < 15  # about 4 s on a quiet core
    assert len(facts) == 500
    first = (
        "len sorted print range zip enumerate open sum min max map filter str.join str.split str.strip str.replace "
        "list.append list.sort list.pop dict.get dict.items dict.update set.add json.dumps json.loads json.dump "
        "json.load os.path.join os.path.exists os.listdir os.getcwd re.sub re.match re.search re.findall math.sqrt math.floor "
        "random.choice time.sleep collections.Counter collections.defaultdict itertools.chain functools.partial "
        "copy.deepcopy subprocess.run"
    )
    assert [name for name in first.split() if name not in facts] == []
    for fact in facts.values():
        assert 2 <= len(fact.summary.split()) <= 25 and fact.summary[-1] in ".!?)" and "  " not in fact.summary
        assert ">>>" not in fact.summary and "`" not in fact.summary and "\n" not in fact.summary
        assert not {"self", "cls"} & set(fact.parameters) and " at 0x" not in fact.signature
    names = set(all_names(("stdlib",)))
    assert set(facts) <= names
    assert len(names) > 5000
