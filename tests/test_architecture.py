"""The shape of the program: imports point down only, and everything stays small enough to read."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import jaxlm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlm"

# Packages (and the modules beside them) from the ground up. One imports only from tiers below its own, or from itself.
TIERS = [
    ["", "errors"],  # "": the package itself, for its version
    ["config"],
    ["ops"],
    ["model", "parallel"],
    ["train"],
    ["data"],
    ["monitor", "generation"],
    ["report", "checkpoints"],
    ["interop"],
    ["run"],
    ["trainer", "plan"],
    ["commands"],
]
TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}
PACKAGES = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
# These run the user's own code, which may raise anything.
OWN_CODE = "config/files.py", "config/validate.py", "monitor/metrics.py", "monitor/sinks.py", "run/hooks.py"
MAY_CATCH_EXCEPTION = {PACKAGE / name for name in OWN_CODE}
MODEL_MAY_IMPORT = {"config", "errors", "ops"}
LONGEST_FILE, LONGEST_FUNCTION = 350, 60  # lines
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_SOURCES = [*SOURCES, *sorted((ROOT / "scripts").glob("*.py"))]
MEASURED = [*ALL_SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))]


def module_name(path: Path) -> str:
    """The module's name below `jaxlm`, such as "data.tokens"; "" for jaxlm/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in SOURCES}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """The modules below `jaxlm` that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "jaxlm":
                below = name.removeprefix("jaxlm").removeprefix(".")
                yield below if below in MODULES else below.rpartition(".")[0]


def room_of(module: str) -> str:
    """The package that a module is of, or the module itself where it stands beside them."""
    return "commands" if module == "__main__" else module.partition(".")[0]


def tier_of(module: str) -> int:
    return TIER[room_of(module)]


def test_the_house_is_small() -> None:
    assert len(TIERS) <= 12
    assert len(PACKAGES) <= 14
    assert set(TIER) - {"", "errors", "trainer"} == PACKAGES, "a new package needs a place in TIERS"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_point_down(name: str) -> None:
    elsewhere = {imported for imported in imports(MODULES[name]) if room_of(imported) != room_of(name)}
    assert not {imported for imported in elsewhere if tier_of(imported) >= tier_of(name)}, f"{name} imports upwards"


@pytest.mark.parametrize("room", sorted(PACKAGES))
def test_no_circle_of_imports_in_a_room(room: str) -> None:
    inside = {name: path for name, path in MODULES.items() if room_of(name) == room}
    TopologicalSorter({name: set(imports(path)) & set(inside) - {name} for name, path in inside.items()}).prepare()


def test_the_package_itself_gives_what_type_checkers_see() -> None:
    """It imports nothing before it is asked (test_install.py looks): jaxlm.config has to come without JAX."""
    (seen,) = (node.body for node in tree(MODULES[""]).body if isinstance(node, ast.If))
    names = {alias.name: node.module for node in seen if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == jaxlm._LAZY and names.keys() == set(jaxlm.__all__)
    assert all(getattr(jaxlm, name) is getattr(import_module(module), name) for name, module in names.items())


def test_the_model_knows_no_mesh_optimizer_or_trainer() -> None:
    for name, path in MODULES.items():
        if name.partition(".")[0] == "model":
            outside = {imported.partition(".")[0] for imported in imports(path)} - {"model"}
            assert outside <= MODEL_MAY_IMPORT, name
            foreign = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
            assert not foreign & {"sharding", "Mesh", "NamedSharding", "PartitionSpec", "with_sharding_constraint"}, (
                name
            )


@pytest.mark.parametrize("folder", ["scripts", "configs"])
def test_scripts_and_configurations_are_short(folder: str) -> None:
    limit = {"scripts": 60, "configs": 40}[folder]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).glob("*.py")}
    assert lengths
    assert {name: n for name, n in lengths.items() if n > limit} == {}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_FILE, f"{lines} lines"
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions(path)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_manners(path: Path) -> None:
    for node in ast.walk(tree(path)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {getattr(kind, "id", getattr(kind, "attr", None)) for kind in caught}
            forbidden = {None, "BaseException"} | ({"Exception"} if path not in MAY_CATCH_EXCEPTION else set())
            assert not names & forbidden, f"{where}: catches everything"
        if isinstance(node, ast.Call):
            assert not second_default(node, path), f"{where}: a second default for an option"


def second_default(call: ast.Call, path: Path) -> bool:
    """Whether `call` is `getattr(config, ...)` or `config.get(name, default)`; the room itself walks over fields."""
    if path.parent.name == "config":
        return False
    held = {"config", "model", "training", "data"}
    if isinstance(call.func, ast.Name) and call.func.id == "getattr":
        return bool(held & set(ast.unparse(call.args[0]).split(".")))
    if isinstance(call.func, ast.Attribute) and call.func.attr == "get" and len(call.args) == 2:
        return bool(held & set(ast.unparse(call.func.value).split(".")))
    return False


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("getattr(config, 'x')", True),
        ("getattr(self.config.model, 'x', 1)", True),
        ("config.model.get('x', 1)", True),
        ("getattr(module, 'x')", False),
        ("limits.get('x', 1)", False),
    ],
)
def test_second_defaults_are_recognised(text: str, found: bool) -> None:
    (statement,) = ast.parse(text).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert second_default(statement.value, Path("x.py")) == found


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_a_stranger_is_run_as_code(path):
    """Checkpoints, tokenizers and JSON configurations are data; a configuration in Python is the user's own program.

    So is a compiled program that training.compiled_program names.
    """
    names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    keywords = {node.arg for node in ast.walk(tree(path)) if isinstance(node, ast.keyword)}
    modules = {alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)}
    assert not (names & {"eval", "exec", "compile"} or modules & {"pickle", "marshal", "shelve", "dill"})
    assert not keywords & {"allow_pickle", "shell", "trust_remote_code"}
    if path.relative_to(ROOT) != Path("jaxlm/run/compiled.py"):
        assert not names & {"deserialize_and_load"}
    if path.relative_to(ROOT) != Path("jaxlm/config/files.py"):
        assert "run_path" not in attributes and "runpy" not in modules
