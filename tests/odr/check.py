#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check.py PROGRAM NM: runs PROGRAM (two instruction sets in one binary) and reads its symbol table with NM.
Both instruction sets must own functions, and no function of fovea may lie outside of them, because the linker would have
kept one copy of it for both. Exit 77 when the CPU cannot run the other unit; the symbols are checked all the same."""
import re
import subprocess
import sys


def main() -> int:
    program, nm = sys.argv[1:3]
    symbols = subprocess.run([nm, "-C", program], capture_output=True, text=True, check=True).stdout.splitlines()
    functions = [m.group(1) for m in (re.match(r"[0-9a-f]+ [tTwWuU] (.*)", line) for line in symbols) if m]
    own = [f for f in functions if re.match(r"(?:non-virtual thunk to |.*? )?fovea::v0::", f) or f.startswith("fovea::")]

    # The program's own words name the two instruction sets, so a change of the naming rule needs no change here.
    run = subprocess.run([program], capture_output=True, text=True)
    print(run.stdout, end="")
    if run.returncode not in (0, 77):
        print(f"{program} ended with {run.returncode}: {run.stderr}")
        return 1
    archs = dict(re.findall(r"^(baseline|other) (\S+)", run.stdout, re.M))
    if run.returncode == 0:
        for unit, arch in archs.items():
            count = sum(f"fovea::v0::{arch}::" in f for f in own)
            print(f"{unit}: {count} functions in fovea::v0::{arch}")
            if count == 0:
                return 1
    homeless = [f for f in own if not re.search(r"fovea::v0::(x86|arm|any)\w*::", f)]
    if homeless:
        print("functions without an instruction set in their name, of which the linker kept one for all:",
              *homeless, sep="\n  ")
        return 1
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
