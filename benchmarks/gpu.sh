#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one go and within ten minutes: a full-size step of the v49 recipe beside
# transformers' generate, the marked tests, TRL beside our loop at full size (a quarter of the budget, two rows a
# micro-batch: that is what it has room for), the kernels of a short step, then TRL on the tiny model. Records go to
# benchmarks/.
#
#     pip install -c constraints.txt -e '.[test]' && bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
part() { echo; echo "== $*"; timeout "$seconds" "$@" || { echo "== failed or out of time: $*"; failed=1; }; }
seconds=220 part python -m grpo.bench configs/v49_random.toml --against generate --json benchmarks/gpu_v49_random.json
seconds=120 part python -m pytest -p no:cacheprovider -m gpu tests
seconds=140 part python benchmarks/step.py --config configs/v49_random.toml --device cuda --dtype bfloat16 --rounds 1 \
    --set rollout.max_new_tokens=256 --set optim.micro_batch_size=2 --no-memory --record benchmarks/gpu_step_9b.json
seconds=60 part python benchmarks/kernels.py configs/v49_random.toml --set rollout.max_new_tokens=64 \
    --record benchmarks/gpu_kernels.json
seconds=60 part python benchmarks/step.py --device cuda --rounds 2 --no-memory --record benchmarks/gpu_step.json
exit "$failed"
