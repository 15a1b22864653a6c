#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_floors.py include/fovea: the rules of the floors (HACKING.md). Exits 1 and names every include that runs upward,
between mechanisms, from an engine to a part, into or out of reference/, and every third-party header outside of its room."""
import os
import pathlib
import re
import sys

FLOOR = dict(core=0, simd=1, engine=2, call=3, mechanisms=3, modules=4, cache=4, distributed=4, analysis=4)
# Eigen's symbols carry no instruction set in their names, so kernels must not meet it; xsimd and intrinsics are floor 1's.
ROOMS = {
    r"(unsupported/)?Eigen/": {"adapters", "analysis"},
    r"xsimd/|immintrin\.h|arm_neon\.h": {"simd"},
    r"tbb/|omp\.h|mdspan": {"adapters"},
    # slow to compile, so not for those who only want a kernel
    r"functional|iostream|ranges|format|regex": {"adapters", "analysis", "modules", "cache", "distributed"},
}


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    bad, files = [], sorted(root.rglob("*.hpp"))
    for file in files:
        own = file.relative_to(root).parts
        for quote, include in re.findall(r'^\s*#\s*include ([<"])([^>"]+)', file.read_text(), re.M):
            if include.startswith("fovea/"):
                to = pathlib.PurePosixPath(include[len("fovea/"):]).parts
            elif quote == '"':
                to = pathlib.PurePosixPath(os.path.relpath(file.parent / include, root)).parts
            else:
                rooms = [where for pattern, where in ROOMS.items() if re.match(rf"({pattern})$|({pattern})(?<=/)", include)]
                if any(own[0] not in where for where in rooms):
                    bad.append(f"{file}: <{include}> belongs into {' or '.join(sorted(set().union(*rooms)))}")
                continue
            up = own[0] in FLOOR and to[0] in FLOOR and FLOOR[to[0]] > FLOOR[own[0]]
            door = own[0] in FLOOR and len(to) == 1                                # a floor never includes a front door
            sibling = own[0] in ("mechanisms", "call") and to[0] == "mechanisms"
            parts = own[0] == "engine" and "parts" not in own and "parts" in to    # an engine knows concepts, not policies
            reference = (own[0] == "reference") != (to[0] == "reference") and len(own) > 1 and to[0] != "core"
            adapter = (own[0] == "adapters" and to[0] != "core") or (to[0] == "adapters" and own[0] != "adapters")
            if up or door or sibling or parts or reference or adapter:
                bad.append(f"{file}: must not include {include}")
    if not files:
        bad.append(f"{root}: no header found")
    print(*(bad or [f"floors: {len(files)} headers keep the rules"]), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
