#!/usr/bin/env bash
# pack.sh [FOLDER]: fills FOLDER (default target/gpu-day) with all that day.sh needs on a machine with a GPU that has
# neither Rust nor this repository: program, test binaries, emulator, kernels, fixtures, scripts. See README.md.
#
#     pack.sh --program P --emulator E --kernels OUT [--test NAME=BINARY]... FOLDER
#
# packs what is built already and does not call cargo; OUT is the OUT_DIR of the build, with its PTX and machine code.
set -euo pipefail

# What travels to a rented machine in one go.
most=50000000
# On a GPU these say something; the tests of the CPU's side have run where this is packed.
targets=(ops unet gpu kernels driver)

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benches/gpu
program='' emulator='' kernels='' folder='' tests=()
while [ $# -gt 0 ]; do
    case $1 in
        --program) program=$2; shift 2 ;;
        --emulator) emulator=$2; shift 2 ;;
        --kernels) kernels=$2; shift 2 ;;
        --test) tests+=("$2"); shift 2 ;;
        -*) echo "pack.sh: $1: --program, --emulator, --kernels, --test or a folder is expected" >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
folder=${folder:-$root/target/gpu-day}

if [ -z "$program" ]; then
    export DDPM_CUDA_TOOLCHAIN=${DDPM_CUDA_TOOLCHAIN:-fetch}
    built=$(mktemp)
    trap 'rm -f "$built"' EXIT
    (cd "$root" && cargo test --release --locked -p ddpm-cuda --no-run --message-format=json-render-diagnostics \
        "${targets[@]/#/--test=}" >"$built")
    # Cargo's messages, a line each: where it has put what.
    found=$(python3 - "$built" "${targets[@]}" <<'PYTHON'
import json
import re
import sys

tests = {}
for line in open(sys.argv[1], encoding="utf-8"):
    message = json.loads(line)
    name = message.get("target", {}).get("name")
    ours = re.search("(^|[/#])ddpm-cuda[ @#]", message.get("package_id", ""))
    if message["reason"] == "build-script-executed" and ours:
        print("kernels", message["out_dir"])
    elif message["reason"] == "compiler-artifact" and message["executable"] and ours and name in sys.argv[2:]:
        tests[name] = message["executable"]
    elif message["reason"] == "compiler-artifact" and message["executable"] and ours:
        print("program", message["executable"])
    elif message["reason"] == "compiler-artifact" and name == "cuda_emu":
        print("emulator", *(f for f in message["filenames"] if f.endswith(".so")))
for name in sys.argv[2:]:
    print(f"test:{name}", tests[name])
PYTHON
    )
    while read -r what path; do
        case $what in
            program) program=$path ;;
            emulator) emulator=$path ;;
            kernels) kernels=$path ;;
            test:*) tests+=("${what#test:}=$path") ;;
        esac
    done <<<"$found"
fi
for file in "$program" "$emulator" "$kernels"; do
    [ -e "$file" ] || { echo "pack.sh: ${file:-a path that was not given}: does not exist; build first" >&2; exit 1; }
done
ls "$kernels"/*.ptx >/dev/null 2>&1 || {
    echo "pack.sh: $kernels: holds no PTX; build with DDPM_CUDA_TOOLCHAIN=fetch or with nvcc in PATH" >&2
    exit 1
}

# Made beside the folder, which is replaced when everything is there.
mkdir -p "$(dirname "$folder")"
folder=$(cd "$(dirname "$folder")" && pwd)/$(basename "$folder")
if [ -e "$folder" ] && [ ! -e "$folder/pack.json" ]; then
    echo "pack.sh: $folder: exists and was not packed; give another folder" >&2
    exit 1
fi
new=$folder.partial
rm -rf "$new"
mkdir -p "$new/tests" "$new/unpacked/bin/tests" "$new/unpacked/kernels"
cp "$here"/{day.sh,day.py,twin.py,variants.json,README.md} "$new/"
cp -r "$root/kernels" "$new/kernels"
cp -r "$root/tests/fixtures" "$new/tests/fixtures"

# Programs without symbols of debuggers, which are three quarters of them; names in backtraces stay.
bare() {
    cp "$1" "$2"
    if command -v strip >/dev/null; then strip --strip-debug "$2" 2>/dev/null || true; fi
}
bare "$program" "$new/unpacked/bin/ddpm-cuda"
bare "$emulator" "$new/unpacked/bin/libcuda_emu.so"
names=''
for test in ${tests[@]+"${tests[@]}"}; do
    bare "${test#*=}" "$new/unpacked/bin/tests/${test%%=*}"
    names+="${names:+, }\"${test%%=*}\""
done
for image in "$kernels"/*.ptx "$kernels"/*.cubin "$kernels"/*.fatbin; do
    case $image in
        *.raw.ptx) ;;
        *) if [ -e "$image" ]; then cp "$image" "$new/unpacked/kernels/"; fi ;;
    esac
done
# Each program holds all kernels, and a window of 64 MiB sees that they are the same.
tar -C "$new/unpacked" -c bin kernels | xz --threads=1 --lzma2=preset=1,dict=64MiB >"$new/binaries.tar.xz"
rm -r "$new/unpacked"

commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
changed=$([ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] && echo false || echo true)
compiler=$("$program" info 2>/dev/null | sed -n 's/^kernels: .*compiled by //p' || true)
printf '{"commit": "%s", "changed": %s, "packed": "%s", "compiler": "%s", "tests": [%s]}\n' \
    "$commit" "$changed" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${compiler:-unknown}" "$names" >"$new/pack.json"

bytes=$(find "$new" -type f -printf '%s\n' | awk '{ all += $1 } END { print all }')
if [ "$bytes" -gt $most ]; then
    echo "pack.sh: $new: $bytes bytes, more than the $most that are taken to a GPU; leave out a test binary" >&2
    exit 1
fi
rm -rf "$folder"
mv "$new" "$folder"
echo "$folder: $((bytes / 1000000)) MB, tests $names; copy it to the GPU and start day.sh there"
