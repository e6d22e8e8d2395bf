#!/usr/bin/env bash
# Proves and measures the kernels on a machine with an NVIDIA GPU, inside a time budget, without a network.
#
#   benchmarks/gpu.sh OUT_DIR [MINUTES=8] [--rehearse]
#
# docs/use/benchmarks.md says what runs, what OUT_DIR gets and what the exit status means. PYTHON names the interpreter;
# otherwise it is the first of python3 and python that has torch. --rehearse goes through it all on the CPU.
set -u

python=${PYTHON:-}
for name in python3 python; do
  [[ -z $python ]] && "$name" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null &&
    python=$name
done
# Without torch the list of what is missing is still to be printed.
python=${python:-$(command -v python3 || command -v python)}
if [[ -z $python ]]; then
  echo "gpu.sh: no python on PATH; name one by PYTHON=/path/to/python" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m benchmarks.gpu "$@"
