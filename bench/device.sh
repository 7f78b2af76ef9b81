#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one, nvcc and no network.
#
#   bench/device.sh                     all parts: build test sanitize ops editing
#   bench/device.sh test ops            some of them; `build` comes first by itself where it was not run yet
#
#   OUT=build/device   where logs, rows and the picture go: at most seven files
#   WHEELS=.whl        folder of wheels of Python packages that the machine lacks
#   OPS= SIZES= SHAPE=llama-3-8b             narrow the parts
#   LIMIT=570          seconds for all parts together; a lent machine ends a command after ten minutes
#   COMMIT=abc1234     what the rows say where the files came without git
#   DEVICE=cpu         a rehearsal without a GPU, which keeps no rows
#
# A part that fails does not stop the next ones; the exit status is the number of failed parts, 100 when none could run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 100

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/device}
WHEELS=${WHEELS:-.whl}
DEVICE=${DEVICE:-cuda}
SHAPE=${SHAPE:-llama-3-8b}
LIMIT=${LIMIT:-570}
SITE=$PWD/build/device-site
read -ra OPS <<<"${OPS:-}"
read -ra SIZES <<<"${SIZES:-}"
PARTS=("$@")
[ $# -gt 0 ] || PARTS=(build test sanitize ops editing)

export HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# What pip must not touch is what the machine came with: the wheels go beside it.
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}

case $PYTHON in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;;
esac
for part in "${PARTS[@]}"; do
  case $part in
    build | test | sanitize | ops | editing) ;;
    *) echo "no part $part; there are build, test, sanitize, ops, editing" >&2; exit 100 ;;
  esac
done
mkdir -p "$OUT" "$SITE" || exit 100

install_wheels() {
  compgen -G "$WHEELS/*.whl" >/dev/null || return 0
  [ -e "$SITE/.wheels" ] && return 0
  "$PYTHON" -m pip install -q --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl &&
    touch "$SITE/.wheels"
}

# Says what is missing; fails when nothing can run. setuptools reads the licence field from 77 on.
check_packages() {
  "$PYTHON" - "$DEVICE" <<'PYTHON'
import importlib.metadata as metadata, sys

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

needed = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "PyYAML", "rich", "typer"]
optional = {
    "setuptools": "build", "pybind11": "build", "ninja": "build", "triton": "Triton kernels",
    "pytest": "test, sanitize, and the gate of ops", "hypothesis": "test, and the gate of ops", "matplotlib": "the picture",
}
missing = [name for name in needed if version(name) is None]
for name, part in optional.items():
    if version(name) is None:
        print(f"{name} is not installed: no {part}")
if int((version("setuptools") or "99").split(".")[0]) < 77:
    print(f"setuptools {version('setuptools')} is too old for pyproject.toml, 77 is wanted")
if missing:
    sys.exit(f"missing, carry their wheels in the folder $WHEELS: {' '.join(missing)}")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU; DEVICE=cpu rehearses without one")
print(", ".join(f"{name} {version(name)}" for name in ["torch", "triton", "transformers"]))
PYTHON
}

has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))" "$@"; }

# Runs a command in what is left of the time, or in the given share (1/n) of it.
limited() { shared 1 "$@"; }
shared() {
  local left=$(((LIMIT - SECONDS) / $1))
  shift
  timeout --kill-after=10 $((left > 5 ? left : 5)) "$@"
}

# From elsewhere: the checkout's own folder would be found as the package, built or not.
built() { (cd / && "$PYTHON" -c 'import sys, fastedit.kernels; sys.argv[1] != "cuda" or __import__("fastedit._cuda")' \
  "$DEVICE") 2>/dev/null; }

part_build() {
  local failed=0 log
  if [ "$DEVICE" = cuda ]; then
    export FASTEDIT_CUDA=1
    command -v nvcc || ls /usr/local/cuda/bin/nvcc || echo "nvcc is not on PATH: Triton and torch only"
    nvidia-smi
  fi
  log=$(mktemp)
  # Editable: fastedit.kernels is a folder of another name in the checkout.
  if limited "$PYTHON" -m pip install -v --no-deps --no-build-isolation --no-cache-dir -e . >"$log" 2>&1; then
    grep -E "ptxas info|spill|warning" "$log" | head -n 200
  else
    tail -n 100 "$log"
    failed=1
  fi
  rm -f "$log"
  "$PYTHON" -c 'from fastedit.cli.main import main; main()' doctor || failed=1
  built || { echo "fastedit's extension for $DEVICE is not there: only what needs none of it runs"; failed=1; }
  return $failed
}

part_test() {
  has pytest hypothesis || { echo "pytest and hypothesis are wanted for the tests"; return 1; }
  if [ "$DEVICE" = cuda ]; then
    limited "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests
  else
    limited "$PYTHON" -m pytest -q -m "not gpu and not slow" -p no:cacheprovider tests/ops
  fi
}

# Small cases alone: a kernel is ten to a hundred times slower here. Torch's caching allocator would hide an access
# beyond the end of a tensor.
part_sanitize() {
  local tool left=3 failed=0 sanitizer
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  [ -x "$sanitizer" ] || { echo "compute-sanitizer is not installed"; return 1; }
  has pytest || { echo "pytest is wanted"; return 1; }
  for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 shared $((left--)) "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --print-limit 5 "$PYTHON" -m pytest -q -x -m gpu -p no:cacheprovider tests/ops \
      -k "tiny or odd or strided or one_neuron" || { echo "$tool: exit status $?"; failed=1; }
  done
  return $failed
}

part_ops() {
  local options=(--device "$DEVICE" --budget "${BUDGET:-0.5}") status
  [ ${#SIZES[@]} -eq 0 ] || options+=(--sizes "${SIZES[@]}")
  [ "$DEVICE" = cuda ] || options+=(--no-rows)
  if ! has pytest hypothesis; then
    echo "without pytest and hypothesis the ops cannot be gated: speeds are shown, no rows are kept"
    options+=(--no-gate)
  fi
  limited "$PYTHON" bench/run.py "${OPS[@]}" "${options[@]}"
  status=$?
  keep_rows
  return $status
}

part_editing() {
  local options=(--random "$SHAPE" --device "$DEVICE" --dtype bfloat16 --threads "$(nproc)") status
  options+=(--edits "${EDITS:-100}" --baseline-edits "${BASELINE_EDITS:-10}")
  [ "$DEVICE" = cuda ] || options+=(--no-rows)
  limited "$PYTHON" bench/editing.py "${options[@]}"
  status=$?
  keep_rows
  return $status
}

keep_rows() {
  local name
  [ "$DEVICE" = cuda ] || return 0
  name=$("$PYTHON" -c "import sys; sys.path.insert(0, 'bench'); import timing; print(timing.device_name('$DEVICE'))")
  cp "bench/results/$name.csv" "$OUT/" 2>/dev/null
  cp "bench/results/$name.png" "$OUT/" 2>/dev/null
  return 0
}

install_wheels || exit 100
check_packages || exit 100
[ "${PARTS[0]}" = build ] || built || PARTS=(build "${PARTS[@]}")

summary=()
failures=0
for part in "${PARTS[@]}"; do
  echo "==== $part"
  started=$SECONDS
  "part_$part" 2>&1 | tee "$OUT/$part.log"
  status=${PIPESTATUS[0]}
  summary+=("$part: exit status $status, $((SECONDS - started)) s")
  [ "$status" -eq 0 ] || failures=$((failures + 1))
done
echo "==== done"
printf '%s\n' "${summary[@]}"
exit "$failures"
