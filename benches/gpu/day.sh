#!/bin/sh
# day.sh [--emulated] STAGE... | all: the first day on a GPU, in a folder that pack.sh has filled. See README.md.
set -eu
cd "$(dirname "$0")"
exec "${PYTHON:-python3}" day.py "$@"
