#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_mirror.py ROOT: each include/fovea/mechanisms/x.hpp has its reference, test, benchmark and page."""
import pathlib
import sys

MIRRORS = ["include/fovea/reference/{}.hpp", "tests/mechanisms/{}_test.cpp", "bench/mechanisms/{}_bench.cpp",
           "docs/mechanisms/{}.md"]


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    names = sorted(file.stem for file in (root / "include/fovea/mechanisms").glob("*.hpp"))
    missing = [f"{name}: {mirror.format(name)} is missing" for name in names for mirror in MIRRORS
               if not (root / mirror.format(name)).is_file()]
    if not names:
        missing.append("include/fovea/mechanisms: no mechanism found")
    print(*(missing or [f"mirror: {len(names)} mechanisms have reference, test, benchmark and page"]), sep="\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
