#!/bin/sh
# Compiles every kernel here to the PTX beside it: NVCC=/path/to/nvcc ./compile.sh [name...]
set -eu
cd "$(dirname "$0")"
nvcc=${NVCC:-nvcc}
[ $# -gt 0 ] || set -- *.cu
for source in "$@"; do
    stem=${source%.cu}
    "$nvcc" -ptx -arch=compute_80 -std=c++17 -O3 -o "$stem.ptx" "$stem.cu"
    case $stem in
    math) "$nvcc" -ptx -arch=compute_80 -std=c++17 -O3 --use_fast_math -o math_fast.ptx math.cu ;;
    esac
done
