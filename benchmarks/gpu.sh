#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one go and within ten minutes: the marked tests, then a full-size step of the v49
# recipe beside transformers' generate, then TRL beside our loop on the tiny model. Records go to benchmarks/.
#
#     pip install -c constraints.txt -e '.[test]' && bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
part() { echo; echo "== $*"; timeout "$seconds" "$@" || { echo "== failed or out of time: $*"; failed=1; }; }
seconds=150 part python -m pytest -p no:cacheprovider -m gpu tests
seconds=300 part python -m grpo.bench configs/v49_random.toml --against generate --json benchmarks/gpu_v49_random.json
seconds=140 part python benchmarks/step.py --against trl --device cuda --rounds 2 --no-memory --record benchmarks/gpu_step.json
exit "$failed"
