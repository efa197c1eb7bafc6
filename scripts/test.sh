#!/usr/bin/env bash
set -euo pipefail
export FLASHCORE_STARTED=$EPOCHSECONDS
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<'END'
usage: bash scripts/test.sh [--all | pytest arguments]

  bash scripts/test.sh                         formatters, linters, types, then every test that this machine can run
  bash scripts/test.sh --all                   the same, and on SGLang 0.5.23 the contract tests and an engine (CI=true does this too)
  bash scripts/test.sh tests/unit -k layout    pytest alone, with these arguments
  FLASHCORE_SGLANG=0.5.23 bash scripts/test.sh tests/contract

Tests that need a Hopper GPU are skipped elsewhere.
END
}

# check <command...>: says what runs; a failure ends the script.
check() {
  progress "$*"
  "$@"
}

lint() {
  local shell_files=(scripts/*.sh .ci/run) sources
  check ruff check .
  check ruff format --check --quiet .
  check mypy
  mapfile -t sources < <(git ls-files --cached --others --exclude-standard {csrc,tests/emulator}/'*.h' {csrc,tests/emulator}/'*.cc' 'csrc/*.cu' {csrc,tests/emulator}/'*.cuh')
  if ((${#sources[@]})); then
    progress "clang-format --dry-run on ${#sources[@]} files"
    clang-format --dry-run --Werror "${sources[@]}"
  fi
  check shellcheck -x "${shell_files[@]}"
}

# Compiles the CUDA library in what the other things leave of the cores. Tests that need it wait for it, and compile it
# themselves, with the compiler's words, if this failed.
build_cuda_beside() {
  progress "cuda library: compiling beside what follows, if there is nvcc"
  nice -n 19 python -m flashcore_sglang build cuda &>/dev/null &
}

cd "$flashcore_root"
case ${1-} in
  --help | -h)
    usage
    exit
    ;;
esac

if (($#)) && [[ $1 != --all ]]; then
  prepare_environment dev
  python -m flashcore_sglang build
  exec python -m pytest "$@"
fi

prepare_environment dev
build_cuda_beside
lint
python -m flashcore_sglang build
if [[ ${1-} == --all || ${CI-} == true ]] && [[ -z ${FLASHCORE_SGLANG-} ]]; then
  (
    export FLASHCORE_SGLANG=0.5.23
    prepare_environment dev
    check python -m pytest tests/contract tests/sglang_kit tests/serve/test_server.py -k "contract or engine"
  )
fi
progress "python -m pytest"
exec python -m pytest
