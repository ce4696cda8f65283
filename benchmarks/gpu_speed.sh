#!/usr/bin/env bash
# How fast is a step of the v49 recipe at full size? At most 400 seconds, from a checkout, nothing installed:
#
#     bash benchmarks/gpu_speed.sh FOLDER
#
# The dearest knowledge first; what an earlier part leaves of its time goes to the last. Records (speed_*), a log and a
# summary go to the folder; each part writes its record as soon as it is done. What a bare machine needs beside torch, and
# the environment variables: benchmarks/README.md. CONFIG, DEVICE, DTYPE and OPTIONS (as "--set rollout.group_size=2")
# serve the tests.
set -uo pipefail
. "$(dirname "$0")/gpu_parts.sh"
begin gpu_speed 400 "${1:-}"
config=${CONFIG:-configs/v49_random.toml}
place="--set model.device=${DEVICE:-cuda} --set model.dtype=${DTYPE:-bfloat16} ${OPTIONS:-}"
short="--set rollout.max_new_tokens=64"

part bench 140 "$python" -m benchmarks.bench "$config" --steps 2 --json "$folder/speed_bench.json" $place
part kernels 60 "$python" benchmarks/kernels.py "$config" --record "$folder/speed_kernels.json" $short $place
needs pytest tests && part tests 70 "$python" -m pytest -p no:cacheprovider -m gpu \
    --junitxml "$folder/speed_tests.xml" tests/test_gpu.py tests/qwen3_5/test_decode_ops.py
# two rows in a micro-batch are what TRL has room for
needs trl trl && part trl 80 "$python" benchmarks/step.py --config "$config" --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" \
    --rounds 1 --no-memory --record "$folder/speed_trl.json" --set optim.micro_batch_size=2 $short ${OPTIONS:-}
part generate 400 "$python" -m benchmarks.bench "$config" --steps 1 --against generate --json "$folder/speed_generate.json" \
    --set rollout.max_new_tokens=256 $place
summarize
