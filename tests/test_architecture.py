"""The house rules that a machine can see: which way imports point, what is imported at all, how long a file is."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_ligo"
LONGEST = 350

# From the ground up: what stands in a room may import from the same room and from those before it.
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
    ("plan", "report"),
    ("testing.forked_ranks", "testing.kill_test"),
    ("experiments",),
    ("bench",),
    ("cli",),
    ("testing.fuzz",),
)
# These need no Megatron-core, no DeepSpeed and no process group.
WITHOUT_RANKS = ("common", "config", "arch", "sharding", "growth", "checkpoint", "export")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports."""
    known = modules()
    found = set()
    for full in imports(path):
        # `from module import thing` names a module one step up.
        target = full if full in known else full.rpartition(".")[0]
        if target in known and target != name:
            found.add(target)
    return found


def room(name: str) -> int:
    path = name.removeprefix(f"{PACKAGE}.") + "."
    found = [number for number, names in enumerate(ROOMS) if any(path.startswith(f"{top}.") for top in names)]
    assert found, f"{name} stands in no room: say in {Path(__file__).name} what it may import"
    return found[0]


def is_version(name: str) -> bool:
    """The package's own file says the version and nothing else: whoever asks for it asks for no room."""
    return name == PACKAGE


def test_imports_point_one_way():
    wrong = []
    for name, path in modules().items():
        for target in own_imports(name, path):
            if is_version(target):
                continue
            if is_version(name) or room(target) > room(name):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_cycles():
    graph = {name: own_imports(name, path) for name, path in modules().items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_package_knows_nothing_of_its_tools():
    for name, path in modules().items():
        assert not [target for target in imports(path) if target.split(".")[0] in ("tools", "tests")], name


def test_conversion_and_growth_need_no_ranks():
    """Really imported, in a process of their own; the formats, which are looked for in a folder, among them."""
    names = sorted(name for name in modules() if is_version(name) or name.split(".")[1] in WITHOUT_RANKS)
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {names}: importlib.import_module(name)",
            "print([name for name in sys.modules if name == 'deepspeed' or name.startswith('megatron.')])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_only_the_mesh_asks_for_process_groups():
    asking = [n for n, path in modules().items() if any("parallel_state" in target for target in imports(path))]
    assert asking == [f"{PACKAGE}.distributed.mesh"]


def test_files_are_short():
    long = {}
    for folder in (PACKAGE, "tools", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > LONGEST:
                long[str(path.relative_to(ROOT))] = count
    assert not long, f"longer than {LONGEST} lines: {long}"


def test_no_tool_bears_the_name_of_a_standard_module():
    """A script's folder comes first on the path: its name would hide the module's."""
    assert not [path.name for path in (ROOT / "tools").glob("*.py") if path.stem in sys.stdlib_module_names]


def test_the_digests_are_of_the_pinned_versions():
    """requirements-hashed.txt names every requirement, at its version, with one digest each."""
    pinned = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        if requirement.strip() and '>= "3.12"' not in marker and not requirement.startswith("#"):
            name, _, version = requirement.strip().partition("==")
            pinned[name.lower()] = version
    hashed = {}
    for line in (ROOT / "requirements-hashed.txt").read_text().splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r"([\w.-]+)==([\w.]+)(\+cpu)? --hash=sha256:[0-9a-f]{64}", line)
            assert found, line
            hashed[found[1]] = found[2]
    assert {name: hashed.get(name) for name in pinned} == pinned
