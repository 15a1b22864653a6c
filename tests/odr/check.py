#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check.py PROGRAM NM: runs PROGRAM (two instruction sets in one binary) and reads its symbol table with NM.
Both instruction sets must own functions, and no function of fovea may lie outside of them, because the linker would have
kept one copy of it for both. The same holds for std::vector of fovea's types, whose growth is a real function. Exit 77 when
the CPU cannot run the other unit; the symbols are checked all the same."""
import re
import subprocess
import sys

ARCH = r"(?:x86|arm|any)(?:_|\b)"


def functions_of(program: str, nm: str, *options: str) -> list[str]:
    listing = subprocess.run([nm, *options, program], capture_output=True, text=True, check=True).stdout
    return [found.group(1) for found in re.finditer(r"^[0-9a-f]+ [tTwW] (.*)$", listing, re.M)]


def belongs_to_fovea_without_arch(mangled: str) -> bool:
    # Mangled, because a demangled template shows its return type first. An instruction set anywhere in the name will do: a
    # template of floor 0 over a type of the kernels has two names as well. x86 with no extension at all is followed by the
    # length of the next name.
    return bool(re.match(r"_ZZ?N[KVRO]*5fovea2v0", mangled)) and not re.search(r"\d(?:x86|arm|any)[_0-9A-Z]", mangled)


def main() -> int:
    program, nm = sys.argv[1:3]
    mangled, readable = functions_of(program, nm), functions_of(program, nm, "-C")

    # The program's own words name the two instruction sets, so a change of the naming rule needs no change here.
    run = subprocess.run([program], capture_output=True, text=True)
    print(run.stdout, end="")
    if run.returncode not in (0, 77):
        print(f"{program} ended with {run.returncode}: {run.stderr}")
        return 1
    for unit, arch in dict(re.findall(r"^(baseline|other) (\S+)", run.stdout, re.M)).items():
        count = sum(f"fovea::v0::{arch}::" in function for function in readable)
        print(f"{unit}: {count} functions in fovea::v0::{arch}")
        if count == 0:
            return 1
    shared = sorted({symbol for symbol in mangled if belongs_to_fovea_without_arch(symbol)} |
                    {name for name in readable if re.search(rf"std::vector<fovea::v0::(?!{ARCH})", name)})
    if shared:
        print("functions without an instruction set in their name, of which the linker kept one for all:", *shared, sep="\n  ")
        return 1
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
