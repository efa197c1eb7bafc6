# shellcheck shell=bash
# The Python environment of serve.sh and test.sh. To use it by hand:
#
#     source scripts/environment.sh && prepare_environment dev
#
# Without a GPU: PyTorch for the CPU, SGLang and all they need, pinned (requirements-cpu.txt). With a Hopper GPU: SGLang
# with its own CUDA dependencies. A step that is done is not repeated until the file that describes it changes.
#
#   FLASHCORE_SGLANG   SGLang version: 0.5.16 (default) or 0.5.23
#   FLASHCORE_VENV     where the environment lies (default: .venv in the checkout; 0.5.23 gets "-0.5.23" appended)

flashcore_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Seconds since the script began; serve.sh and test.sh export the beginning, so that what they run counts from it too.
progress() { printf '[%4d s] %s\n' "$((EPOCHSECONDS - ${FLASHCORE_STARTED:-$EPOCHSECONDS}))" "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  return 1
}

# "cuda" where the first GPU is a Hopper, else "cpu".
flashcore_device() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || true
  case $capability in
    9.*) echo cuda ;;
    *) echo cpu ;;
  esac
}

# The interpreter to make the environment with. The CPU set is pinned for 3.11; SGLang with CUDA runs on 3.11 and 3.12.
_find_python() {
  local wanted=(python3.11) name
  if [[ $1 == cuda ]]; then wanted+=(python3.12); fi
  for name in "${wanted[@]}"; do
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "python: want ${wanted[*]} with the venv module on PATH, got none; install python3.11 and python3.11-venv"
}

# _step <directory> <name> <key> <words> <command...>: runs the command unless it was run before for the same key. The
# stamp lies in the environment, so an environment made anew repeats every step.
_step() {
  local directory=$1 stamp=$1/.flashcore-$2 key=$3 words=$4 log=$1.log
  shift 4
  if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
  progress "$words"
  if ! "$@" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "$words: want exit code 0, got a failure (above; all of it in $log)"
    return 1
  fi
  mkdir -p "$directory"
  printf '%s' "$key" >"$stamp"
}

_hash() { cat "$@" | sha256sum | cut -c 1-16; }

_pip() { "$1/bin/python" -m pip --disable-pip-version-check --no-input "${@:2}"; }

# torch's CPU build comes from the index pip is set up with, or else from PyTorch's own.
_install_cpu() {
  local requirements=$flashcore_root/scripts/requirements-cpu.txt
  _pip "$1" install --no-deps -r "$requirements" ||
    _pip "$1" install --no-deps -r "$requirements" --extra-index-url https://download.pytorch.org/whl/cpu
}

_make_venv() {
  local python
  python=$(_find_python "$2") && "$python" -m venv "$1"
}

# The second SGLang version lies on top of the first environment: a .pth file after its own packages.
_make_overlay() {
  local python=$2/bin/python
  "$python" -m venv --clear --without-pip "$1"
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/flashcore_base.pth"
}

_install_package() { _pip "$1" install --no-deps --force-reinstall -e "$flashcore_root"; }

# Every step names its failure itself; "|| return" because errexit is off in what a caller tests.
_prepare_locked() {
  local device=$1 version=$2 base=$3 venv=$4 dev=$5
  local scripts=$flashcore_root/scripts package
  package="$(_hash "$flashcore_root/pyproject.toml") $flashcore_root"
  if [[ -f $base/.flashcore-venv && $(<"$base/.flashcore-venv") != "$device, in $base" ]]; then
    fail "$base: want an environment for $device, in $base, got one for $(<"$base/.flashcore-venv"); remove it"
    return 1
  fi
  _step "$base" venv "$device, in $base" "making $base" _make_venv "$base" "$device" || return
  if [[ $device == cuda ]]; then
    _step "$base" sglang "$version" "installing SGLang $version with CUDA (several GB)" \
      _pip "$base" install "sglang==$version" gguf==0.19.0 || return
  else
    _step "$base" sglang "$(_hash "$scripts/requirements-cpu.txt")" \
      "installing SGLang 0.5.16 and PyTorch for the CPU (0.5 GB to fetch, about a minute)" \
      _install_cpu "$base" || return
  fi
  _step "$base" package "$package" "installing flashcore-sglang (editable)" _install_package "$base" || return
  if [[ -n $dev ]]; then
    _step "$base" dev "$(_hash "$scripts/requirements-dev.txt")" "installing the test tools" \
      _pip "$base" install --no-deps -r "$scripts/requirements-dev.txt" || return
  fi
  if [[ $venv == "$base" ]]; then return; fi

  # A second SGLang version, on top of the first.
  local requirements=$scripts/requirements-cpu-$version.txt
  _step "$venv" venv "$base $(<"$base/.flashcore-sglang")" "making $venv on top of $base" \
    _make_overlay "$venv" "$base" || return
  _step "$venv" sglang "$(_hash "$requirements")" "installing SGLang $version for the CPU" \
    _pip "$venv" install --no-deps -r "$requirements" || return
  _step "$venv" package "$package" "installing flashcore-sglang (editable)" _install_package "$venv"
}

# prepare_environment [dev]: makes what is missing ("dev": with the test tools too), then enters the environment.
# Sets flashcore_device_path to cpu or cuda.
prepare_environment() {
  local version=${FLASHCORE_SGLANG:-0.5.16} base=${FLASHCORE_VENV:-$flashcore_root/.venv} venv bin
  flashcore_device_path=$(flashcore_device)
  case $version in
    0.5.16) ;;
    0.5.23) if [[ $flashcore_device_path == cuda ]]; then base+=-$version; fi ;;
    *) fail "FLASHCORE_SGLANG: want 0.5.16 or 0.5.23, got $version" || return ;;
  esac
  venv=$base
  if [[ $flashcore_device_path == cpu && $version != 0.5.16 ]]; then venv=$base-$version; fi
  if [[ $base != /* ]]; then base=$PWD/$base venv=$PWD/$venv; fi
  mkdir -p "$(dirname "$base")"
  (
    if ! flock --nonblock 9; then
      progress "waiting for another run that prepares $base"
      flock 9
    fi
    _prepare_locked "$flashcore_device_path" "$version" "$base" "$venv" "${1-}"
  ) 9>"$base.lock" || return

  bin=$venv/bin
  if [[ $venv != "$base" ]]; then bin+=:$base/bin; fi
  export VIRTUAL_ENV=$venv PATH=$bin:$PATH
  if [[ $flashcore_device_path == cpu ]]; then
    export SGLANG_USE_CPU_ENGINE=1  # without it SGLang asks for vllm's kernels
    export TRITON_INTERPRET=1       # page sizes above 1: SGLang's allocator is a Triton kernel
    export OMP_WAIT_POLICY=passive  # three processes share the cores
    export PYTHONPATH=$flashcore_root/flashcore_sglang/_cpu_stubs${PYTHONPATH:+:$PYTHONPATH}
  fi
}
