#!/usr/bin/env bash
# Puts a CUDA 13.0 toolkit (compiler, runtime, cuBLAS, NCCL, CUPTI, disassembler)
# into one folder, from NVIDIA's Python wheels; no system packages, no root:
#   deploy/install_cuda.sh PREFIX
# Does nothing when PREFIX already holds exactly this set.
set -euo pipefail
prefix=${1:?usage: install_cuda.sh PREFIX}

# The pins are the whole set: dependencies are not followed.
wheels=(
  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-cupti==13.0.85
  nvidia-nvtx==13.0.85 nvidia-cuda-profiler-api==13.0.85 nvidia-nvml-dev==13.0.87
  nvidia-cublas==13.1.0.3 nvidia-nccl-cu13==2.28.3
  nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
)
stamp=$prefix/.wheels
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "${wheels[*]}" ]; then
  echo "cuda: $prefix is up to date"
  exit 0
fi

parent=$(dirname "$prefix")
mkdir -p "$parent"
work=$(mktemp -d "$parent/.cuda.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A system Python under PEP 668 allows --target installs only when told so.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
python3 -m pip install -q --no-deps --no-compile --no-cache-dir --only-binary=:all: \
  --target "$work" "${wheels[@]}"

root=$work/nvidia/cu13
for folder in include lib; do cp -al "$work/nvidia/nccl/$folder/." "$root/$folder/"; done
find "$root/bin" "$root/nvvm/bin" -maxdepth 1 -type f -exec chmod +x {} +
ln -sfn lib "$root/lib64"  # where nvcc and CMake look
# Wheels carry libX.so.13; the linker asks for libX.so.
for so in "$root"/lib/lib*.so.[0-9]*; do ln -sfn "$(basename "$so")" "${so%%.so.*}.so"; done

# No wheel carries the driver's libraries. For linking, stand-ins with every
# function their headers declare; at run time the driver's own are found.
mkdir -p "$root/lib/stubs"
stand_in() {  # stand_in FILE SONAME HEADER FUNCTION-PATTERN
  grep -ohE "$4" "$root/include/$3" | sort -u |
    awk '{print "void " $0 "(void){__builtin_trap();}"}' |
    gcc -shared -fPIC -O0 -w -x c - -Wl,-soname,"$2" -o "$root/lib/stubs/$1"
}
stand_in libcuda.so libcuda.so.1 cuda.h '\bcu[A-Z][A-Za-z0-9]+(_v[0-9]+)?\b'
stand_in libnvidia-ml.so libnvidia-ml.so.1 nvml.h '\bnvml[A-Z][A-Za-z0-9]+(_v[0-9]+)?\b'

rm -rf "$prefix"
mv "$root" "$prefix"
printf '%s' "${wheels[*]}" >"$stamp"
"$prefix/bin/nvcc" --version | tail -2
