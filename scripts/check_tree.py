#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_tree.py ROOT: the licence line first in every source file and page, no line too wide to read, no path of somebody's machine,
links only to public places, no large files."""
import pathlib
import re
import shutil
import subprocess
import sys

SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCE = {".hpp", ".cpp", ".h", ".py", ".cmake", ".sh", ".in"}
PAGES = {".md", ".txt"}
DATA = {"examples/models/kjv-tiny/held_out.txt"}   # text that a program reads: a line more would be data
WIDTH = 140   # .clang-format aims at 125
FILE_LIMIT, MODEL_LIMIT, TREE_LIMIT = 1 << 20, 10_000_000, 20 << 20
MACHINE_PATH = re.compile(r"(?<![\w.$}/*-])/(work|tmp|root|home|Users|mnt)/\w")
PUBLIC = {"github.com", "gitlab.com", "arxiv.org", "doi.org", "www.apache.org", "en.cppreference.com",
          "www.gutenberg.org", "gutenberg.org", "www.debian.org", "packages.debian.org", "openreview.net", "huggingface.co",
          "xsimd.readthedocs.io", "spdx.org", "keepachangelog.com", "semver.org", "www.agner.org", "www.intel.com",
          "pytorch.org"}


def files_of(root: pathlib.Path) -> list[pathlib.Path]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    if listing is not None and listing.returncode == 0:
        return sorted({root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()})
    skipped = {".git", "build", "__pycache__"}   # an unpacked archive is no git repository, and a bare machine has no git
    return sorted(f for f in root.rglob("*") if f.is_file() and not skipped.intersection(f.relative_to(root).parts))


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    bad, total, files = [], 0, files_of(root)
    for file in files:
        name, size = file.relative_to(root).as_posix(), file.stat().st_size
        total += size
        limit = MODEL_LIMIT if name.startswith("examples/models/") else FILE_LIMIT
        if size > limit:
            bad.append(f"{name}: {size} bytes, at most {limit}")
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        script = bool(lines) and lines[0].startswith("#!")
        source = file.suffix in SOURCE or script or file.name in ("CMakeLists.txt", ".clang-format", ".gitignore")
        if source or (file.suffix in PAGES and name not in DATA):
            if not lines or SPDX not in lines[1 if script and len(lines) > 1 else 0]:
                bad.append(f"{name}: the first line is not '{SPDX}'")
        if source:
            bad += [f"{name}:{n}: {len(line)} columns, at most {WIDTH}" for n, line in enumerate(lines, 1)
                    if len(line) > WIDTH]
            bad += [f"{name}:{n}: tab" for n, line in enumerate(lines, 1) if "\t" in line]
        # CTest keeps names in a CMake list, where a semicolon makes two tests of one, and neither is the one that was written.
        bad += [f"{name}:{n}: a semicolon in a test's name" for n, line in enumerate(lines, 1)
                if re.match(r'\s*(TEST_CASE|TEMPLATE_TEST_CASE)\w*\("[^"]*;', line)]
        if size > FILE_LIMIT or name == "scripts/check_tree.py":
            continue
        for n, line in enumerate(lines, 1):
            if not line.startswith("#!") and MACHINE_PATH.search(line):
                bad.append(f"{name}:{n}: a path of somebody's machine: {line.strip()[:80]}")
            for host in re.findall(r"https?://([^/\s:\"'`)>\]]+)", line):
                if host not in PUBLIC:
                    bad.append(f"{name}:{n}: link to {host}, which is not in PUBLIC of scripts/check_tree.py")
    if total > TREE_LIMIT:
        bad.append(f"the tree has {total} bytes, at most {TREE_LIMIT}")
    print(*(bad or [f"tree: {len(files)} files, {total / 1e6:.1f} MB, keep the rules"]), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
