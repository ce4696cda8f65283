#!/usr/bin/env bash
# Does this GPU compute what it should? At most 150 seconds, from a checkout, nothing installed:
#
#     bash benchmarks/gpu_check.sh FOLDER
#
# Records (check_*.json), a log and a summary go to the folder; each part writes its record as soon as it is done. What a
# bare machine needs beside torch, and the environment variables: benchmarks/README.md. CONFIG and OPTIONS (more options of
# gpu_check.py, as "--device cpu --small") serve the tests.
set -uo pipefail
. "$(dirname "$0")/gpu_parts.sh"
begin gpu_check 150 "${1:-}"
check() { part "$1" "$2" "$python" benchmarks/gpu_check.py "$folder" ${3:-$1} --config "${CONFIG:-configs/v49_random.toml}" ${OPTIONS:-}; }
check machine 20
check attention 30
check kernels 50
check step 90 "step capture"
summarize
