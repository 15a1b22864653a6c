#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_snippets.py ROOT: every ```cpp block of README.md and docs/ stands word for word in a file that is compiled: an
example or a file of tests/doc. Only the indentation of the block as a whole may differ. Code that is not meant to compile
(a sketch, a compiler's message) is fenced as ```text."""
import pathlib
import re
import sys


def blocks(page: pathlib.Path):
    lines, start = [], 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if start == 0 and re.match(r"\s*```\s*(cpp|c\+\+|cxx|cc)\b", line):
            start, lines = number, []
        elif start and re.match(r"\s*```\s*$", line):
            yield start, lines
            start = 0
        elif start:
            lines.append(line.rstrip())
    if start:
        raise SystemExit(f"{page}:{start}: the block is never closed")


def dedent(lines: list[str]) -> list[str]:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return [line[margin:] for line in lines]


def contains(text: list[str], block: list[str]) -> bool:
    return any(dedent(text[at:at + len(block)]) == block for at in range(len(text) - len(block) + 1))


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    pages = [page for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))] if page.is_file()]
    sources = [file for folder in ("examples", "tests/doc") for suffix in ("cpp", "hpp")
               for file in sorted((root / folder).rglob(f"*.{suffix}"))]
    compiled = [[line.rstrip() for line in file.read_text().splitlines()] for file in sources]
    bad, count = [], 0
    for page in pages:
        for number, lines in blocks(page):
            count += 1
            block = dedent(lines)
            while block and not block[-1]:
                block.pop()
            while block and not block[0]:
                block.pop(0)
            if not block or not any(contains(text, block) for text in compiled):
                bad.append(f"{page.relative_to(root)}:{number}: this block is in no file under examples/ or tests/doc/")
    print(*(bad or [f"snippets: {count} blocks on {len(pages)} pages are compiled"]), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
