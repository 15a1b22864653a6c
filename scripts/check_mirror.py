#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_mirror.py ROOT: each include/fovea/mechanisms/x.hpp has its reference, test, benchmark and page, and fovea.hpp reaches
it, like every front door that its comment does not except."""
import os
import pathlib
import re
import sys

MIRRORS = ["include/fovea/reference/{}.hpp", "tests/mechanisms/{}_test.cpp", "bench/mechanisms/{}_bench.cpp",
           "docs/mechanisms/{}.md"]


def reached(header: pathlib.Path, seen: set[pathlib.Path]) -> set[pathlib.Path]:
    if header not in seen:
        seen.add(header)
        for include in re.findall(r'^\s*#\s*include "([^"]+)"', header.read_text(), re.M):
            reached(pathlib.Path(os.path.normpath(header.parent / include)), seen)
    return seen


def not_reached(folder: pathlib.Path) -> list[str]:
    everything = folder / "fovea.hpp"
    excepted = set(re.findall(r"\w+\.hpp", " ".join(re.findall(r"//(.*)\(not included here", everything.read_text()))))
    wanted = [door for door in folder.glob("*.hpp") if door.name not in excepted and not door.stem.endswith("-inl")]
    inside = reached(everything, set())
    return [f"{header.relative_to(folder)}: fovea.hpp does not reach it"
            for header in sorted([*wanted, *(folder / "mechanisms").glob("*.hpp")]) if header not in inside]


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    names = sorted(file.stem for file in (root / "include/fovea/mechanisms").glob("*.hpp"))
    missing = [f"{name}: {mirror.format(name)} is missing" for name in names for mirror in MIRRORS
               if not (root / mirror.format(name)).is_file()]
    missing += not_reached(root / "include/fovea")
    if not names:
        missing.append("include/fovea/mechanisms: no mechanism found")
    print(*(missing or [f"mirror: {len(names)} mechanisms have reference, test, benchmark and page and are in fovea.hpp"]), sep="\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
