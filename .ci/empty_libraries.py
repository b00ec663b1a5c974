"""Builds stand-ins for the CUDA libraries that torch's CUDA build is linked to, so that it runs on a CPU without them.

Usage: empty_libraries.py FOLDER, torch's lib folder, where they are put. Needs gcc and readelf. Libraries of nvidia's
packages that are installed beside torch are kept. Every function of a stand-in returns 100, an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

# Of the driver too: torch does without it.
OF_THE_SYSTEM = re.compile(r"lib(pthread|m|dl|c|rt|gcc_s|stdc\+\+|gomp|cuda)\.so|ld-linux")
# Symbols of libraries that do not version theirs.
OF_CUDA = re.compile(r"(cu|nccl|nvshmem|nvrtc|nvJit)")


def read_elf(path: Path, *options: str) -> list[str]:
    command = ["readelf", "-W", *options, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def list_missing(folder: Path) -> tuple[set[str], dict[str, dict[str, set[str]]], set[str]]:
    """Returns the libraries that those in `folder` need and that are not there, the symbols wanted of them by library
    and version, and those without a version."""
    paths = sorted(folder.glob("*.so*"))
    installed = folder.parents[1].glob("nvidia/*/lib/*.so*")
    own = {path.name for path in (*paths, *installed)}
    libraries, loose, defined = set(), set(), set()
    versioned: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in paths:
        names = (match[1] for line in read_elf(path, "-d") if (match := re.search(r"NEEDED.*\[(.*)\]", line)))
        libraries |= {name for name in names if name not in own and not OF_THE_SYSTEM.match(name)}
        library, library_of = "", {}
        for line in read_elf(path, "-V"):
            if match := re.search(r"File: (\S+)", line):
                library = match[1]
            elif match := re.search(r"Name: (\S+)", line):
                library_of[match[1]] = library
        for line in read_elf(path, "--dyn-syms"):
            fields = line.split()
            if len(fields) < 8 or not fields[0][:-1].isdigit():
                continue
            symbol, _, version = fields[7].partition("@")
            version = version.lstrip("@")
            if fields[6] != "UND":
                defined.add(symbol)
            elif version:
                versioned[library_of.get(version, "")][version].add(symbol)
            elif OF_CUDA.match(symbol):
                loose.add(symbol)
    return libraries, versioned, loose - defined


def build(folder: Path) -> None:
    libraries, versioned, loose = list_missing(folder)
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "empty.c"), Path(scratch, "empty.map")
        for library in sorted(libraries):
            versions = versioned.get(library, {})
            symbols = set().union(*versions.values(), loose)
            loose = set()
            source.write_text("".join(f"int {symbol}(void) {{ return 100; }}\n" for symbol in sorted(symbols)))
            lists = (f"{name} {{ global: {'; '.join(sorted(of))}; }};\n" for name, of in versions.items())
            script.write_text("".join(lists))
            options = [f"-Wl,--version-script,{script}"] if versions else []
            options += ["-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
            subprocess.run(["gcc", *options, "-o", folder / library, source], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
