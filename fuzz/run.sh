#!/usr/bin/env bash
# Runs fuzz targets: fuzz/run.sh [SECONDS] [TARGET...]; 20 seconds each and all of them without arguments. Needs stable
# Rust and a C++ compiler. DDPM_FUZZ_SEED=1 tries the same inputs each time. README.md says more.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-20}
targets=("${@:2}")
[ ${#targets[@]} -gt 0 ] || targets=(npy npz idx png_folder jpeg_folder images zip_images tar_images parquet_images
    ddpm cifar cifar_python safetensors torch config_json config_toml run_folder rank_messages)

# Coverage as cargo-fuzz asks for it without a sanitizer. With --target the flags are not for build scripts.
host=$(rustc -vV | sed -n 's/^host: //p')
out=$(cd .. && pwd)/target/fuzz
flags="-Cpasses=sancov-module"
for part in level=4 inline-8bit-counters pc-table trace-compares; do
    flags+=" -Cllvm-args=-sanitizer-coverage-$part"
done
bins=()
for target in "${targets[@]}"; do bins+=(--bin "$target"); done
RUSTFLAGS=$flags DDPM_CUDA_TOOLCHAIN=none CARGO_TARGET_DIR=$out \
    cargo build --release --locked --quiet --target "$host" "${bins[@]}"

memory=${TMPDIR:-/tmp}
[ -d /dev/shm ] && [ -w /dev/shm ] && memory=/dev/shm
TMPDIR=$(mktemp -d "$memory/ddpm-cuda-fuzz-XXXXXX")
trap 'rm -rf "$TMPDIR"' EXIT
# One thread, so that an input always takes the same path.
export TMPDIR RAYON_NUM_THREADS=1 RUST_BACKTRACE=1

# Runs a target, two lines of libFuzzer's log in one.
one() {
    local target=$1 dir=$out/$1 program=$out/$host/release/$1 status=0
    mkdir -p "$dir/corpus" "$dir/found"
    DDPM_FUZZ_SEEDS=$dir/seeds "$program" >"$dir/log" 2>&1 || { cat "$dir/log" >&2 && return 1; }
    "$program" "$dir/corpus" "$dir/seeds/inputs" -dict="$dir/seeds/words.dict" -artifact_prefix="$dir/found/" \
        -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        -seed="${DDPM_FUZZ_SEED:-0}" \
        >"$dir/log" 2>&1 || status=$?
    local runs coverage
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$dir/log")
    coverage=$(grep -o 'cov: [0-9]*' "$dir/log" | tail -1)
    printf '%-12s %9s executions, %s, exit %s\n' "$target" "${runs:-?}" "${coverage:-cov: ?}" "$status"
    [ "$status" -eq 0 ] && return
    grep -E 'panicked at|memory allocation of|ERROR: libFuzzer|^Test unit written' -A 2 "$dir/log" | head -12 >&2
    sed -n "s|.*Test unit written to \(.*\)|reproduce with: $program \1|p" "$dir/log" >&2
    return 1
}

failed=0
while [ ${#targets[@]} -gt 0 ]; do
    pids=()
    for target in "${targets[@]:0:2}"; do
        one "$target" &
        pids+=($!)
    done
    targets=("${targets[@]:2}")
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
done
exit $failed
