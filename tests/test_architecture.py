"""The shape of the package: who imports whom, what stays light, what is never done (docs/architecture.md)."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hifusion

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "src" / "hifusion"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400


def _table() -> dict[str, tuple[int, str]]:
    """Room -> its row in docs/architecture.md (rooms of one row are siblings) and its third-party column."""
    rooms: dict[str, tuple[int, str]] = {}
    for number, line in enumerate((REPO / "docs" / "architecture.md").read_text().splitlines()):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            rooms |= dict.fromkeys(re.findall(r"`(\w+)(?:\.py|/)`", cells[0]), (number, cells[3]))
    return rooms


TABLE = _table()


def _room(path: Path) -> str | None:
    """The room a source file belongs to; None for the package's own door, which may lead anywhere."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first in ("__init__", "__main__") else first


def _imports(tree: ast.AST, parts: tuple[str, ...]) -> set[str]:
    """Dotted names of all that a module imports, at the top or inside a function; `parts` is its package."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _imports_of(path: Path) -> set[str]:
    return _imports(ast.parse(path.read_text()), ("hifusion", *path.relative_to(PACKAGE).parent.parts))


def _rooms_in(names: set[str]) -> set[str]:
    """The table's rooms among imported names: `hifusion.store.prepare` -> `store`; `hifusion.InputError` -> none."""
    return {name.split(".")[1] for name in names if name.startswith("hifusion.")} & set(TABLE)


def _unsafe(tree: ast.AST) -> list[str]:
    """What in a module may run code from a data file, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: import {m}" for m in modules if m.split(".")[0] in {"pickle", "dill", "joblib"}]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            dangers = {
                "allow_pickle": keywords.get("allow_pickle", "False") != "False",
                "read_pickle": called.endswith("read_pickle"),
                "yaml.load": called in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"},
                "torch.load without weights_only=True": called == "torch.load"
                and keywords.get("weights_only") != "True",
                "weights_only=False": keywords.get("weights_only") == "False",
                "eval or exec": called in {"eval", "exec"},
            }
            found += [f"{node.lineno}: {name}" for name, is_so in dangers.items() if is_so]
    return found


def _output_of(script: str) -> str:
    """What a fresh Python prints for the script; this package's source comes first on its path."""
    script = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_table_and_source_name_the_same_rooms():
    assert {room for path in SOURCES if (room := _room(path))} == set(TABLE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    room = _room(path)
    if room is None:
        pytest.skip("the package's own door leads to every room")
    assert room in TABLE, f"{room} has no row in docs/architecture.md"
    wrong = {other for other in _rooms_in(_imports_of(path)) - {room} if TABLE[other][0] >= TABLE[room][0]}
    assert not wrong, f"{room} stands above or beside {sorted(wrong)} in docs/architecture.md"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_only_where_the_table_says_so(path):
    room = _room(path)
    if any(name.split(".")[0] in {"torch", "lightning_fabric"} for name in _imports_of(path)):
        assert room in TABLE
        assert "torch" in TABLE[room][1], f"the third-party column of {room} does not name torch"


def test_models_import_only_torch_and_errors():
    extras = {"stnet.py": {"monai"}}  # DenseNet, imported inside the function that builds it
    for path in (PACKAGE / "models").glob("*.py"):
        names = _imports_of(path)
        allowed = set(sys.stdlib_module_names) | {"torch", "hifusion"} | extras.get(path.name, set())
        foreign = {name.split(".")[0] for name in names} - allowed
        assert not foreign, f"{path.name} imports {sorted(foreign)}"
        assert _rooms_in(names) <= {"models", "errors"}


@pytest.mark.parametrize(
    "statement", ["import hifusion; dir(hifusion)", "import hifusion.cli", "import hifusion.plots"]
)
def test_torch_is_not_loaded_by(statement):
    assert _output_of(f"{statement}; print('torch' in sys.modules)") == "False"


def test_every_verb_of_the_package_can_be_had_again_and_again():
    """Asked for a second time too, when the modules are loaded: none of them has a verb's name."""
    asked = "all(callable(getattr(h, verb)) for _ in range(2) for verb in h.__all__ if verb not in ('__version__',))"
    assert _output_of(f"import hifusion as h; print({asked}, callable(h.synth.write_cohort))") == "True True"


def test_a_name_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'pridict'"):
        hifusion.pridict  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long_and_none_loads_unsafely(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert _unsafe(ast.parse(text)) == []


@pytest.mark.parametrize(
    "line",
    [
        "np.load(path, allow_pickle=True)",
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "fabric.load(path, weights_only=False)",
        "yaml.load(text)",
        "pd.read_pickle(path)",
    ],
)
def test_the_unsafe_load_check_sees(line):
    assert _unsafe(ast.parse(line))


@pytest.mark.parametrize("line", ["np.load(path)", "torch.load(path, weights_only=True)", "yaml.safe_load(text)"])
def test_the_unsafe_load_check_allows(line):
    assert not _unsafe(ast.parse(line))


def test_the_import_check_sees_relative_and_nested_imports():
    text = "from . import hifusion\nfrom ..store import open_store\ndef f():\n    import hifusion.synth"
    names = _imports(ast.parse(text), ("hifusion", "models"))
    assert names == {"hifusion.models.hifusion", "hifusion.store.open_store", "hifusion.synth"}


def test_every_dependency_has_its_reason_on_its_line():
    lines = (REPO / "pyproject.toml").read_text().splitlines()
    floors = [line for line in lines if re.match(r'\s*"[\w.-]+(\[[\w,]*\])?[>=<!~]', line)]
    assert len(floors) > 16, "the pattern no longer finds the dependencies"
    assert [line for line in floors if not re.search(r'",?\s+#\s*\S', line)] == []
