"""Rules of the code base that the syntax tree can check: imports, names, sizes, keys, docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from megatron_ligo.arch import architectures
from megatron_ligo.checkpoint import formats
from megatron_ligo.commands.models import convert

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_ligo"
MAX_LINES = 350
MAX_FILES = 15  # per folder
MAX_LOOSE_MODULES = 2  # beside the rooms

# From the ground up: a room imports from itself and from the rooms before it.
ROOMS = (
    ("common",),
    ("config",),
    ("arch",),
    ("sharding",),
    ("growth",),
    ("distributed",),
    ("checkpoint",),
    ("export",),
    ("models",),
    ("data",),
    ("training",),
    ("planning", "report"),
    ("testing.preload", "testing.forked_ranks", "testing.kill_test"),
    ("experiments",),
    ("api",),
    ("bench",),
    ("cli",),
    ("testing.fuzz",),
    ("commands",),
    ("__main__",),
)
# Rooms that import neither Megatron-core nor DeepSpeed and need no process group.
WITHOUT_RANKS = ("common", "config", "arch", "sharding", "growth", "checkpoint", "export")
FORMATS = f"{PACKAGE}.checkpoint.formats."
COMMANDS = f"{PACKAGE}.commands."
FAMILIES = f"{PACKAGE}.arch.families"
# Parameter keys that are also ordinary words: a literal counts as a key only where a parameter is looked up.
ORDINARY_WORDS = {"head", "up", "down", "gate", "o", "q", "k", "v", "patch", "positions", "pooler", "embed"}
# A shape such as (large, small), a number, or a reference to another shape.
SHAPE = re.compile(r"\([^()]*[\w.][^()]*\)|\bshapes?\b|\bscalar\b|\bshaped\b|\bnumel\b", re.IGNORECASE)


@cache
def modules() -> dict[str, Path]:
    """Returns every module of the package by its dotted name."""
    paths = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    return paths


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Yields (module, node) for every syntax node of the package."""
    for module, path in modules().items():
        for node in ast.walk(syntax_tree(path)):
            yield module, node


def imports(path: Path) -> set[str]:
    """Returns the dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_imports(name: str, path: Path) -> set[str]:
    """Returns the modules of the package that a module imports."""
    targets = set()
    for full in imports(path):
        # `from module import member` names a module one step up.
        target = full if full in modules() else full.rpartition(".")[0]
        if target in modules() and target != name:
            targets.add(target)
    return targets


def room(name: str) -> int:
    path = name.removeprefix(f"{PACKAGE}.") + "."
    matches = [number for number, names in enumerate(ROOMS) if any(path.startswith(f"{top}.") for top in names)]
    assert matches, f"{name} is in no room: add it to ROOMS in {Path(__file__).name}"
    return matches[0]


def is_top(name: str) -> bool:
    """True for the package's own module and for folders that hold parts of several rooms."""
    return name in (PACKAGE, f"{PACKAGE}.testing")


def test_imports_point_one_way():
    wrong = []
    for name, path in modules().items():
        for target in package_imports(name, path):
            if not is_top(target) and (is_top(name) or room(target) > room(name)):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_cycles():
    graph = {name: package_imports(name, path) for name, path in modules().items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_package_does_not_import_tools_or_tests():
    for name, path in modules().items():
        assert not [target for target in imports(path) if target.split(".")[0] in ("tools", "tests")], name


def test_conversion_and_growth_need_no_ranks():
    """Imports the rooms in a fresh process, formats included."""
    names = sorted(name for name in modules() if name == PACKAGE or name.split(".")[1] in WITHOUT_RANKS)
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {names}: importlib.import_module(name)",
            "print([name for name in sys.modules if name == 'deepspeed' or name.startswith('megatron.')])",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_only_the_mesh_uses_megatrons_process_groups():
    users = [name for name, path in modules().items() if any("parallel_state" in target for target in imports(path))]
    assert users == [f"{PACKAGE}.distributed.mesh"]


def test_class_names_are_unique():
    owners = defaultdict(list)
    for module, node in nodes():
        if isinstance(node, ast.ClassDef):
            owners[node.name].append(module)
    assert not {name: where for name, where in owners.items() if len(where) > 1}


def test_module_names_are_unique():
    """Outside checkpoint/formats/*/, where each format may have its own reader or format module, and commands/*/,
    whose modules have the names of the commands."""
    stems = Counter(
        path.stem
        for module, path in modules().items()
        if path.stem != "__init__" and not module.startswith((FORMATS, COMMANDS))
    )
    assert not [stem for stem, count in stems.items() if count > 1]


def test_files_are_short():
    counts = {}
    for folder in (PACKAGE, "tools", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            counts[str(path.relative_to(ROOT))] = len(path.read_text(encoding="utf-8").splitlines())
    assert not {name: count for name, count in counts.items() if count > MAX_LINES}


def test_folders_are_small():
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in modules().values())
    # One file a family, found by its name.
    counts.pop(f"{PACKAGE}/arch/families")
    assert not {folder: count for folder, count in counts.items() if count > MAX_FILES}
    loose = [path.name for path in (ROOT / PACKAGE).glob("*.py") if path.stem != "__init__"]
    assert len(loose) <= MAX_LOOSE_MODULES, loose


def parameter_keys() -> set[str]:
    """Returns every key of every family's table; a layer's also without its prefix."""
    keys = {param.key for architecture in architectures().values() for param in architecture.params}
    return keys | {key.removeprefix("layers.{}.") for key in keys}


def looks_up(node: ast.AST) -> bool:
    """True for syntax that looks a parameter up: a subscript, a comparison or a call with the literal in it."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant)
    if isinstance(node, ast.Compare):
        return any("key" in ast.unparse(side).lower() for side in (node.left, *node.comparators))
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("param", "read")


def literals(node: ast.AST) -> Iterator[str]:
    parts = [node.slice] if isinstance(node, ast.Subscript) else ast.iter_child_nodes(node)
    for part in parts:
        for leaf in ast.walk(part):
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                yield leaf.value


def test_only_the_families_name_parameters():
    keys = parameter_keys()
    named = []
    for module, node in nodes():
        if module.startswith(FAMILIES):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            pattern = re.sub(r"^layers\.\d+\.", "layers.{}.", node.value)
            if pattern in keys - ORDINARY_WORDS:
                named.append(f"{module}:{node.lineno}: {node.value!r}")
        elif looks_up(node):
            named += [f"{module}:{node.lineno}: {text!r}" for text in literals(node) if text in ORDINARY_WORDS]
    assert not named, "\n".join(named)


def test_formats_are_not_probed():
    """A format is a class that states its abilities: no module or format is searched for attributes."""
    probes = [
        f"{module}:{node.lineno}"
        for module, node in nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
        and re.search(r"\b(module|format|formats)\b", ast.unparse(node.args[0]))
        and "engine.module" not in ast.unparse(node.args[0])
    ]
    assert not probes, probes


def test_one_module_syncs_files():
    syncing = {
        module for module, node in nodes() if isinstance(node, ast.Attribute) and node.attr in ("fsync", "fdatasync")
    }
    assert syncing == {f"{PACKAGE}.common.atomic_files"}


@cache
def base_methods() -> set[tuple[str, str]]:
    """Returns (class, method) of every class of the package: an override keeps the shapes of its base's docstring."""
    return {
        (node.name, method.name)
        for _, node in nodes()
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }


def is_override(owner: ast.AST, method: ast.FunctionDef) -> bool:
    """True if a base class defines the method: one of the package's, or torch's autograd.Function."""
    if not isinstance(owner, ast.ClassDef):
        return False
    bases = [ast.unparse(base) for base in owner.bases]
    return "torch.autograd.Function" in bases or any((base, method.name) in base_methods() for base in bases)


def public_tensor_functions() -> Iterator[tuple[str, str]]:
    """Yields (name, docstring with its class's) of public functions with a Tensor in their signature."""
    for module, path in modules().items():
        tree = syntax_tree(path)
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            class_name = getattr(owner, "name", "")
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or class_name.startswith("_"):
                    continue
                if is_override(owner, node):
                    continue
                hints = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
                if any(hint and re.search(r"\bTensor\b", ast.unparse(hint)) for hint in hints):
                    docstrings = [ast.get_docstring(node), ast.get_docstring(owner) if class_name else None]
                    yield f"{module}.{class_name}.{node.name}", " ".join(filter(None, docstrings))


def test_public_tensor_functions_state_shapes():
    assert not [name for name, text in public_tensor_functions() if not SHAPE.search(text)]


def test_no_tool_has_the_name_of_a_standard_module():
    """A script's folder comes first on the path: its name would hide the module's."""
    assert not [path.name for path in (ROOT / "tools").glob("*.py") if path.stem in sys.stdlib_module_names]


def test_help_of_convert_lists_the_formats():
    """The command states them as text, so that its help need not import them."""
    options = [
        f"{name}: {option.name}  {option.metadata['help']}"
        for name in formats.writers()
        for option in fields(formats.get(name).options)
    ]
    assert [line.strip() for line in convert.FORMAT_OPTIONS.strip().splitlines()[1:]] == options
    assert list(convert.WRITERS) == formats.writers()


def test_hashed_requirements_match_the_pins():
    """requirements-hashed.txt lists every requirement at its pinned version, with one digest each."""
    pinned = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        if requirement.strip() and '>= "3.12"' not in marker and not requirement.startswith("#"):
            name, _, version = requirement.strip().partition("==")
            pinned[name.lower()] = version
    hashed = {}
    for line in (ROOT / "requirements-hashed.txt").read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)(\+cpu)? --hash=sha256:[0-9a-f]{64}", line)
            assert match, line
            hashed[match[1]] = match[2]
    assert {name: hashed.get(name) for name in pinned} == pinned
