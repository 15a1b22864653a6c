#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What one call of fovea::attention costs the program that makes it: seconds to compile and KiB of code, per compiler.

Compiles an empty file, a file that only includes the header, a file with one call, and files with 1, 8 and 32 variants (a
score functor and a mask functor each, all different); the best of several runs each, one after the other. All of them take
minutes: --only names the files wanted. With --max-seconds or --max-kib it fails when one variant costs more, so that CI can hold
a limit.
"""
import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

SOURCES = {
    "empty file": "int nothing;\n",
    "include only": "#include <fovea/attention.hpp>\nint nothing;\n",
    "one call": """#include <fovea/attention.hpp>
bool run(const float* q, const float* k, const float* v, float* out, fovea::index_t len) {
  return fovea::attention(fovea::bhsd(q, 1, 32, len, 128), fovea::bhsd(k, 1, 8, len, 128), fovea::bhsd(v, 1, 8, len, 128),
                          fovea::bhsd(out, 1, 32, len, 128), {.causal = fovea::Causal::bottom_right})
      .ok();
}
""",
}


def variants(count):
    calls = "".join(f"""
  ok = ok && fovea::attention(x, y, y, z, options,
                              fovea::variant()
                                  .with_score([](auto s, int, int, int q, auto k) {{ return s - {n + 1}.5f * fovea::to_float(q - k); }})
                                  .with_mask([](int, int, int q, auto k) {{ return k + {n + 1} <= q; }}))
                 .ok();""" for n in range(count))
    return f"""#include <fovea/attention.hpp>
bool run(const float* q, const float* k, float* out, fovea::index_t len) {{
  const auto x = fovea::bhsd(q, 1, 32, len, 128), y = fovea::bhsd(k, 1, 8, len, 128);
  const auto z = fovea::bhsd(out, 1, 32, len, 128);
  const fovea::AttentionOptions options;
  bool ok = true;{calls}
  return ok;
}}
"""


SOURCES |= {"1 variant": variants(1), "8 variants": variants(8), "32 variants": variants(32)}
LIMITED = "1 variant"


def code_kib(object_file):
    """Code and read-only data, as the Berkeley format of `size` counts them."""
    lines = subprocess.run(["size", str(object_file)], check=True, capture_output=True, text=True).stdout.splitlines()
    return int(lines[1].split()[0]) / 1024


def compile_once(compiler, flags, source, object_file):
    start = time.perf_counter()
    done = subprocess.run([compiler, *flags, "-c", str(source), "-o", str(object_file)], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{compiler} does not compile {source.name}:\n{done.stderr[:4000]}")
    return seconds


def main():
    root = pathlib.Path(__file__).resolve().parents[2]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--compiler", action="append", help="may be repeated; default: g++ and the clang++ that is found")
    options.add_argument("--flags", default="-O2 -march=native", help="default: %(default)s")
    options.add_argument("--include", action="append", default=[], help="a folder with xsimd, where it is no system package")
    options.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    options.add_argument("--only", action="append", choices=SOURCES, help="may be repeated; default: all files")
    options.add_argument("--max-seconds", type=float, help=f"limit for {LIMITED}")
    options.add_argument("--max-kib", type=float, help=f"limit for {LIMITED}")
    given = options.parse_args()
    wanted = {name: text for name, text in SOURCES.items() if not given.only or name in given.only}
    if LIMITED not in wanted and (given.max_seconds is not None or given.max_kib is not None):
        options.error(f"the limits are for {LIMITED}, which --only leaves out")

    compilers = given.compiler
    if not compilers:
        clang = next((name for name in ("clang++", "clang++-14") if shutil.which(name)), None)
        compilers = [name for name in ("g++", clang) if name and shutil.which(name)]
    flags = ["-std=c++20", *given.flags.split(), f"-I{root / 'include'}", *(f"-isystem{folder}" for folder in given.include)]
    too_much = []
    print(f"flags: -std=c++20 {given.flags}; best of {given.runs}")
    print(f"{'compiler':<14} {'file':<14} {'seconds':>8} {'KiB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for compiler in compilers:
            for name, text in wanted.items():
                source = pathlib.Path(folder) / (name.replace(" ", "_") + ".cpp")
                source.write_text(text)
                seconds = min(compile_once(compiler, flags, source, source.with_suffix(".o")) for _ in range(given.runs))
                kib = code_kib(source.with_suffix(".o"))
                print(f"{compiler:<14} {name:<14} {seconds:8.2f} {kib:8.1f}", flush=True)
                if name != LIMITED:
                    continue
                if given.max_seconds is not None and seconds > given.max_seconds:
                    too_much.append(f"{compiler}, {name}: {seconds:.2f} s, limit {given.max_seconds:g} s")
                if given.max_kib is not None and kib > given.max_kib:
                    too_much.append(f"{compiler}, {name}: {kib:.1f} KiB, limit {given.max_kib:g} KiB")
    for line in too_much:
        print(f"too much: {line}", file=sys.stderr)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
