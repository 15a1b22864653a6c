#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check.py CASE COMPILER FLAGS...: CASE must not compile, and the compiler must print every `// expect: words` of its first
lines; with -DFOVEA_MUST_COMPILE it must compile. `// flags: ...` adds flags to both runs."""
import pathlib
import re
import subprocess
import sys


def compile_case(command: list[str]) -> tuple[bool, str]:
    # -c, not -fsyntax-only: a static_assert inside a template speaks only when the template is instantiated.
    run = subprocess.run(command + ["-c", "-o", "/dev/null"], capture_output=True, text=True)
    return run.returncode == 0, run.stderr


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def main() -> int:
    case, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
    words, flags = [], []
    for line in case.read_text().splitlines():
        if not line.startswith("//"):
            break
        if line.startswith("// expect: "):
            words.append(line.removeprefix("// expect: ").strip())
        if line.startswith("// flags: "):
            flags += line.removeprefix("// flags: ").split()
    if not words:
        print(f"{case.name}: no `// expect:` line")
        return 1
    command += flags + [str(case)]

    compiled, printed = compile_case(command)
    if compiled:
        print(f"{case.name}: compiled, but must be refused with: {words}")
        return 1
    missing = [w for w in words if squeeze(w) not in squeeze(printed)]
    if missing:
        print(f"{case.name}: the compiler refused it without the words {missing}. It said:\n{printed[:4000]}")
        return 1
    compiled, printed = compile_case(command + ["-DFOVEA_MUST_COMPILE"])
    if not compiled:
        print(f"{case.name}: must compile with -DFOVEA_MUST_COMPILE. The compiler said:\n{printed[:4000]}")
        return 1
    print(f"{case.name}: refused in the words expected, and accepted when corrected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
