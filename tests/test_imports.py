"""Which package may import which: the packages' imports point down, and nothing imports in a circle."""

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import REPOSITORY

from nnunet_semiseg.cli import COMMANDS
from pseudo_label.cli import COMMANDS as PSEUDO_LABEL_COMMANDS

PACKAGES = ("nnunet_semiseg", "dataset_conversion", "pseudo_label")
# Of the extras in pyproject.toml.
OPTIONAL = {
    *("h5py", "nilearn", "edt", "openvino", "psutil", "pynvml", "submitit"),
    *("hatchling", "editables", "monai", "surface_distance", "medpy"),
}


def run_at_import(node):
    """The nodes that run when a module is imported, but for what may fail in a ``try``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Try)):
            yield from run_at_import(child)


def imported(source, package, nodes=ast.walk):
    """The modules that the source of a module of ``package`` imports; by default, wherever in it."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(module, package)
            # What is imported of a package may be a module of it.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(file, nodes=ast.walk):
    return set(imported(file.read_text(encoding="utf-8"), ".".join(file.relative_to(REPOSITORY).parts[:-1]), nodes))


def imports(package):
    """{file: what it imports}, of all modules of a package."""
    return {file: imports_of(file) for file in sorted((REPOSITORY / package).rglob("*.py"))}


def test_every_kind_of_import_is_found():
    source = "import a.b\ndef f():\n    from c.d import e\n    from . import g\n    from ..h import i as j\n"
    assert set(imported(source, "x.y")) == {"a.b", "c.d.e", "x.y.g", "x.h.i"}
    assert list(imported(source, "x.y", run_at_import)) == ["a.b"]


@pytest.mark.parametrize(
    "package, above",
    [
        ("nnunet_semiseg", ("dataset_conversion", "pseudo_label")),
        ("dataset_conversion", ("pseudo_label",)),
        ("pseudo_label", ("dataset_conversion",)),
    ],
)
def test_packages_import_only_those_below(package, above):
    found = imports(package)
    assert len(found) > 5
    assert [(str(f), name) for f, names in found.items() for name in names if name.split(".")[0] in above] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_tables_of_commands_know_their_modules(package):
    commands = f"{package}.commands"
    found = [
        (str(file), name)
        for file, names in imports(package).items()
        for name in names
        if name.startswith(commands) and file.parent.name != "commands"
    ]
    assert found == []


def test_the_parts_of_a_package_do_not_import_in_a_circle():
    """A part is a folder with what is in it, or a single module, such as ``nnunet_semiseg.data``."""
    for package in PACKAGES:
        files = imports(package)
        parts = {file: file.relative_to(REPOSITORY / package).with_suffix("").parts[0] for file in files}
        graph = {part: set() for part in parts.values()}
        for file, names in files.items():
            for name in names:
                top, _, rest = name.partition(".")
                part = rest.partition(".")[0]
                # ``from nnunet_semiseg import __version__`` is of the package itself.
                part = part if part in graph else "__init__"
                if top == package and part != parts[file]:
                    graph[parts[file]].add(part)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"{package}: {' imports '.join(reversed(error.args[1]))}")
        if package == "nnunet_semiseg":
            assert "data" in graph["trainers"] and "files" in graph["data"]


def test_no_module_and_no_test_needs_an_optional_library_to_be_imported():
    files = [file for folder in (*PACKAGES, "tests") for file in (REPOSITORY / folder).rglob("*.py")]
    for file in files:
        names = {name.split(".")[0] for name in imports_of(file, run_at_import)}
        assert not names & OPTIONAL, (
            f"{file} imports {names & OPTIONAL}: do it where it is used, or pytest.importorskip"
        )
        # Tests import scripts, too.
        scripts = (REPOSITORY / "scripts" / f"{name}.py" for name in names)
        files += [script for script in scripts if script.is_file() and script not in files]


def test_every_command_has_its_module():
    for table in (COMMANDS, PSEUDO_LABEL_COMMANDS):
        for module, meaning in table.values():
            assert importlib.util.find_spec(module) and meaning
    assert COMMANDS["convert"][0].startswith("dataset_conversion.")
