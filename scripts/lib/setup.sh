# SPDX-License-Identifier: Apache-2.0
# Shared by the scripts beside this folder: packages, configure, build, progress. Sourced, not run.
# FOVEA_SKIP_PACKAGES=1 leaves the machine's packages alone; what is missing is then CMake's to find or to fetch.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
started=$SECONDS

say() { printf '\n== [%d s] %s\n' "$((SECONDS - started))" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

have() { command -v "$1" >/dev/null 2>&1; }

package_installed() { [[ "$(dpkg-query -W -f='${Status}' "$1" 2>/dev/null)" == "install ok installed" ]]; }

# A tool counts as present when its command is there, wherever it came from; a library when its package is.
need_tools() {
  local pair
  for pair in g++:g++ cmake:cmake ninja:ninja-build ccache:ccache python3:python3; do
    have "${pair%%:*}" || wanted+=("${pair#*:}")
  done
  wanted+=(libeigen3-dev libxsimd-dev)
}

# install_packages PACKAGE...: installs those that are missing, or says which are missing and ends.
install_packages() {
  local wanted=("$@") missing=() package runner=()
  need_tools
  if [[ -n "${FOVEA_SKIP_PACKAGES:-}" ]]; then return; fi
  if ! have dpkg-query || ! have apt-get; then
    for package in g++ cmake python3; do
      have "$package" || missing+=("$package")
    done
    if ((${#missing[@]})); then
      fail "this is not a Debian machine, and these commands are missing: ${missing[*]}"
    fi
    say "Not a Debian machine: libraries are found by CMake or fetched from GitHub"
    return
  fi
  for package in "${wanted[@]}"; do
    package_installed "$package" || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return; fi

  if ((EUID != 0)); then
    if have sudo && sudo -n true 2>/dev/null; then
      runner=(sudo -n)
    else
      printf 'error: these packages are missing, and installing them needs root:\n\n' >&2
      printf '  sudo apt-get install %s\n\n' "${missing[*]}" >&2
      printf 'Install them and run this again, or set FOVEA_SKIP_PACKAGES=1 to go on without.\n' >&2
      exit 1
    fi
  fi
  say "Installing ${#missing[@]} missing packages: ${missing[*]}"
  "${runner[@]}" apt-get update -q || fail "apt-get update failed; missing packages: ${missing[*]}"
  "${runner[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" ||
    fail "apt-get could not install: ${missing[*]}"
}

jobs() {
  # A test file takes up to 1.5 GB to compile with sanitizers: fewer jobs than cores where memory is short.
  local cores memory_gb
  cores="$(nproc 2>/dev/null || echo 2)"
  memory_gb="$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo 4)"
  local fit=$((memory_gb * 2 / 3))
  ((fit >= 1)) || fit=1
  echo $((cores < fit ? cores : fit))
}

# configure PRESET FOLDER [-D ...]
configure() {
  local preset="$1" folder="$root/build/$2"
  shift 2
  say "Configuring $preset in build/${folder##*/}"
  # A folder that was moved here from elsewhere holds paths of its old place, and CMake refuses it.
  if [[ -f "$folder/CMakeCache.txt" ]] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$folder/CMakeCache.txt"; then
    rm -rf "$folder"
  fi
  local generator=()
  if [[ ! -f "$folder/CMakeCache.txt" ]] && have ninja; then generator=(-G Ninja); fi
  (cd "$root" && cmake --preset "$preset" -B "$folder" "${generator[@]}" "$@")
}

# build FOLDER TARGET...
build() {
  local folder="$root/build/$1" targets=()
  shift
  if (($#)); then targets=(--target "$@"); fi
  say "Building ${*:-everything} in build/${folder##*/}, $(jobs) jobs"
  cmake --build "$folder" --parallel "$(jobs)" "${targets[@]}"
}
