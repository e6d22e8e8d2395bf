#!/usr/bin/env bash
# Proves and measures the kernels on a machine with an NVIDIA GPU, inside a time budget, without a network.
#
#   benchmarks/gpu.sh OUT_DIR [MINUTES=8]
#
# Needs a CUDA build of torch, pybind11, cmake, ninja and pytest already installed, nvcc for the CUDA kernels, and
# the packages of wavemix-kernels[bench] for the last stage. PYTHON names the interpreter. Stages, most important
# first: build for this GPU alone, parity tests, compute-sanitizer, benchmarks. OUT_DIR gets a log per stage,
# bench/results.json (written as results come) and summary.txt.
# Exit status: 0; 1 if the build or a parity stage failed; 2 if nothing could be started.
set -u -o pipefail

if [[ $# -lt 1 || $# -gt 2 || ! ${2:-8} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: benchmarks/gpu.sh OUT_DIR [MINUTES=8]; got: $*" >&2
  exit 2
fi
python=${PYTHON:-$(command -v python || command -v python3)}
if [[ -z $python ]]; then
  echo "gpu.sh: no python on PATH; name one by PYTHON=/path/to/python" >&2
  exit 2
fi
if ! capability=$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu.sh: torch does not import ({error})")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no NVIDIA GPU on this machine; nothing to do")
print("".join(map(str, torch.cuda.get_device_capability())))
'); then
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

deadline=$((SECONDS + 60 * ${2:-8}))
summary=$out/summary.txt
parity_failed=0
: >"$summary"

say() { echo "$*" | tee -a "$summary"; }

# stage NAME PERCENT COMMAND...: runs it within PERCENT of the time that is left, log in OUT_DIR/NAME.log. At the
# end of its time it gets an interrupt, on which the benchmarks write what they have.
stage() {
  local name=$1 seconds=$(((deadline - SECONDS) * $2 / 100)) begin=$SECONDS status
  shift 2
  if ((seconds < 5)); then
    say "SKIP  $name: no time left"
    return 125
  fi
  timeout --signal=INT --kill-after=15 "$seconds" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) say "PASS  $name ($((SECONDS - begin)) s): $(tail -n 1 "$out/$name.log")" ;;
    124 | 137) say "TIME  $name: stopped after $seconds s; $name.log has what it did" ;;
    *) say "FAIL  $name ($((SECONDS - begin)) s, status $status): $(tail -n 1 "$out/$name.log")" ;;
  esac
  return $status
}

say "GPU   $("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'), sm_$capability"

build() { "$python" -m pip install --no-build-isolation --no-deps --no-index --verbose -e .; }
export -f build
export python
export WAVEMIX_KERNELS_CUDA=1 WAVEMIX_KERNELS_CUDA_ARCHS=$capability
backends=(cuda triton)
if ! stage build 60 bash -c build; then
  parity_failed=1
  # The Triton kernels need no nvcc: a GPU at hand is too good to leave them unproved.
  backends=(triton)
  WAVEMIX_KERNELS_CUDA=0 stage build-without-cuda 60 bash -c build
fi

# A skip prints its reason: -ra.
for tests in ops/test_haar.py ops kernels/cuda kernels/triton; do
  name=$(basename "${tests#ops/test_}" .py)
  stage "parity-$name" 50 "$python" -m pytest -q -ra -p no:cacheprovider -k "not emulator" "tests/$tests" --device cuda ||
    parity_failed=1
done

for backend in "${backends[@]}"; do
  stage "exercise-$backend" 30 "$python" -m benchmarks.harness.exercise "$backend" || parity_failed=1
done

if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  # Its own allocation for each tensor: an access past the end must not land in a neighbour's block of the cache.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    for backend in "${backends[@]}"; do
      stage "$tool-$backend" 20 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -m benchmarks.harness.exercise "$backend"
      # Out of time is no verdict; an error found is.
      [[ $? -eq 9 ]] && parity_failed=1
    done
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  say "SKIP  compute-sanitizer: not installed"
fi

limit=$(((deadline - SECONDS) * 85 / 100))
if ((limit >= 20)); then
  stage benchmarks 97 "$python" -m benchmarks --device cuda --out "$out/bench" --limit "$limit" ||
    say "      benchmarks: the cases measured before it ended are in bench/results.json, if any"
else
  say "SKIP  benchmarks: no time left"
fi

say "$([[ $parity_failed -eq 0 ]] && echo 'OK    parity holds' || echo 'FAIL  the build or parity failed')"
exit "$parity_failed"
