#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
usage: bash scripts/sanitize.sh [memcheck] [racecheck] [initcheck] [synccheck]

compute-sanitizer over small cases of every GPU path (tests/gpu/sanitize_cases.py): the tools named, by default all four,
side by side on one Hopper GPU; about a minute. Wanted: python3 with torch and apache-tvm-ffi, and compute-sanitizer of
CUDA 13. Logs go to $FLASHCORE_SANITIZER_LOGS (default: a new directory). Exit code 1 if a tool reports an error.

  PYTORCH_NO_CUDA_MEMORY_CACHING=1   so that every tensor is an allocation whose bounds the tools know
  --num-cuda-barriers                a block has up to 112 mbarriers, initialised in loops, which the compiler may undercount
  FLASHCORE_RACECHECK=1              a build for racecheck: it does not follow __syncwarp to one lane's arrival at an mbarrier,
                                     nor release and acquire; there every lane arrives, and flags are atomics
END
}

case ${1-} in
  --help | -h)
    usage
    exit
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
logs=${FLASHCORE_SANITIZER_LOGS:-$(mktemp -d)}
mkdir -p "$logs"
tools=("$@")
if ((!$#)); then tools=(memcheck racecheck initcheck synccheck); fi
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
cd "$root"
python3 -m flashcore_sglang build cuda >/dev/null # once, not by every tool
if [[ " ${tools[*]} " == *" racecheck "* ]]; then FLASHCORE_RACECHECK=1 python3 -m flashcore_sglang build cuda >/dev/null; fi

# check <tool>: its exit code is the tool's.
check() {
  local options=(--tool "$1" --error-exitcode 1 --print-limit 20 --num-cuda-barriers 128)
  if [[ $1 == racecheck ]]; then export FLASHCORE_RACECHECK=1; fi # in a subshell
  # initcheck has to see what other kernels write.
  if [[ $1 != initcheck ]]; then options+=(--kernel-name kernel_substring=flashcore); fi
  compute-sanitizer "${options[@]}" python3 tests/gpu/sanitize_cases.py >"$logs/$1.log" 2>&1
}

jobs=()
for tool in "${tools[@]}"; do
  check "$tool" &
  jobs+=($!)
done
failed=0
for i in "${!tools[@]}"; do
  verdict=clean
  wait "${jobs[i]}" || verdict=FAILED failed=1
  printf '%-10s %s (%s): %s\n' "${tools[i]}" "$verdict" "$logs/${tools[i]}.log" \
    "$(grep -E 'SUMMARY|Error' "$logs/${tools[i]}.log" | tail -n 1)"
done
exit "$failed"
