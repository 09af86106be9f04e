"""The rules of the house, read off the source: imports run one way, files stay small, nothing untrusted is executed."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each folder may import. Every folder may import itself; `mmfoundry` itself (the version) is open to all.
MAY_IMPORT = {
    "pipeline": set(),
    "data": {"pipeline"},
    "models": {"pipeline"},
    "evals": {"models", "data", "pipeline"},
    "stages": {"evals", "models", "data", "pipeline"},
    "launch": {"stages", "evals", "models", "data", "pipeline"},
    "mmfoundry": set(),
}
SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
ALL_PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
MAX_LINES, MAX_FUNCTION_LINES = 500, 80
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at its top or inside functions."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # tests beside one another may; sources write mmfoundry.... in full
                assert path.is_relative_to(ROOT / "tests"), f"{relative(path)}:{node.lineno}: relative import"
                continue
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        for line, name in imports_of(path):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package == "mmfoundry" and target in MAY_IMPORT and target not in allowed:
                wrong.append(f"{relative(path)}:{line} imports {name}")
            if package in MAY_IMPORT and package != "mmfoundry":
                wrong.append(f"{relative(path)}:{line} imports a bare {name}")
    assert not wrong, "\n".join(wrong)


def test_names_of_modules_as_strings_run_one_way_too() -> None:
    """`Registry(package="mmfoundry....")` imports by name; it may name its own folder only."""
    wrong = []
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.fullmatch(r"mmfoundry\.([a-z_]+)(\.[a-z_]+)*", node.value)
                if named and named[1] in MAY_IMPORT and named[1] not in MAY_IMPORT[folder] | {folder}:
                    wrong.append(f"{relative(path)}:{node.lineno}: {node.value}")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_listed_for_install() -> None:
    found = {
        ".".join((*(() if path.parent.name == "mmfoundry" else ("mmfoundry",)), *path.parent.relative_to(ROOT).parts))
        for path in SOURCES
        if path.name == "__init__.py"
    }
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), f"{relative(path.parent)} has no __init__.py"


def test_every_folder_is_mapped() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["package-dir"].values()) == set(MAY_IMPORT)


def test_every_import_is_a_declared_dependency() -> None:
    declared = {normal(re.split(r"[<>=\[; ]", line)[0]) for line in PYPROJECT["project"]["dependencies"]}
    optional = {
        normal(re.split(r"[<>=\[; ]", line)[0])
        for lines in PYPROJECT["project"]["optional-dependencies"].values()
        for line in lines
    }
    owners = importlib.metadata.packages_distributions()
    wrong = []
    for path in SOURCES:
        for line, name in imports_of(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "mmfoundry":
                continue
            if not {normal(owner) for owner in owners.get(top, [top])} & (declared | optional):
                wrong.append(f"{relative(path)}:{line}: {top}")
    assert not wrong, "not in pyproject.toml:\n" + "\n".join(wrong)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.split("==")[0]) for line in lines if "==" in line}
    assert all(line.startswith("#") or "==" in line for line in lines)
    named = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    assert {normal(re.split(r"[<>=\[; ]", line)[0]) for line in named} <= pinned


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in ALL_PYTHON:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        wrong += [f"{relative(path)} has {lines} lines"] if lines > MAX_LINES else []
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                wrong += [f"{relative(path)}: {node.name} has {length}"] if length > MAX_FUNCTION_LINES else []
    assert not wrong, "\n".join(wrong)


def test_what_is_public_is_documented() -> None:
    wrong = []
    for path in SOURCES:
        if path.stat().st_size and not ast.get_docstring(tree_of(path)):
            wrong.append(f"{relative(path)}: no module docstring")
        for node in public(tree_of(path)):
            if not ast.get_docstring(node):
                wrong.append(f"{relative(path)}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of public classes that override nothing."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not node.bases:
                yield from (
                    method
                    for method in node.body
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                )


def test_nothing_untrusted_is_executed() -> None:
    wrong = []
    for path in ALL_PYTHON:
        for line, name in imports_of(path):
            if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}:
                wrong.append(f"{relative(path)}:{line}: imports {name}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                wrong += [f"{relative(path)}:{node.lineno}: {text}" for text in unsafe(node)]
    assert not wrong, "\n".join(wrong)


def unsafe(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"):
        yield name
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name.endswith("np.load") and given.get("allow_pickle", "False") != "False":
        yield "np.load with allow_pickle"
    if name == "yaml.load" and given.get("Loader") not in ("_Loader", "yaml.SafeLoader"):
        yield "yaml.load without a safe loader"
    if given.get("shell", "False") != "False":
        yield "shell"
    if given.get("trust_remote_code") == "True":
        yield "trust_remote_code=True"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval(x)", True),
        ("torch.load(x)", True),
        ("torch.load(x, weights_only=False)", True),
        ("torch.load(x, weights_only=True)", False),
        ("np.load(x, allow_pickle=True)", True),
        ("np.load(x)", False),
        ("yaml.load(x, Loader=yaml.Loader)", True),
        ("subprocess.run(x, shell=True)", True),
        ("model.eval()", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", True),
    ],
)
def test_the_rule_on_untrusted_input_sees(source: str, found: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert bool(list(unsafe(call))) == found


def test_no_error_is_swallowed() -> None:
    """A handler of every exception must raise; `except Exception: carry on` hides bugs."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            broad = isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            )
            if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                wrong.append(f"{relative(path)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not wrong, "catches everything and carries on:\n" + "\n".join(wrong)


def test_no_todo_is_left() -> None:
    wrong = []
    for path in ALL_PYTHON:
        found = re.search(r"#.*\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))
        if found and path != Path(__file__):
            wrong.append(f"{relative(path)}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def test_every_config_field_is_described() -> None:
    """`mmfoundry config schema` and editors show the descriptions; a field without one is unusable from YAML."""
    wrong = []
    classes = [(path, node) for path in SOURCES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
    configs, size = {"Config"}, 0
    while size != len(configs):
        size = len(configs)
        configs |= {node.name for _, node in classes if {ast.unparse(base) for base in node.bases} & configs}
    assert "StageConfig" in configs
    for path, node in classes:
        if node.name in configs:
            for field in node.body:
                if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).startswith("ClassVar"):
                    continue
                text = ast.unparse(field)
                if "description=" not in text and not ast.unparse(field.target).startswith(("_", "model_config")):
                    wrong.append(f"{relative(path)}:{field.lineno}: {node.name}.{ast.unparse(field.target)}")
    assert not wrong, "\n".join(wrong)


def test_import_does_little() -> None:
    """Importing the package, its command and its spine's plan must not load torch: `--help` is quick."""
    import subprocess

    code = (
        "import sys, mmfoundry.launch.cli, mmfoundry.pipeline.recipe, mmfoundry.launch.catalog;"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'polars') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
