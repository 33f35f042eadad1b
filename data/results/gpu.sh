#!/bin/sh
# All that needs a GPU, from a clean clone: sh data/results/gpu.sh OUT. It writes into OUT and stops at a
# failure but of the benchmark, which may not fit.
set -eu
out=${1:-runs/gpu}
mkdir -p "$out"
python -m venv .venv && .venv/bin/pip install -q -r requirements.txt transformers
nvidia-smi --query-gpu=name,memory.total --format=csv > "$out/gpu.csv"

# The gradients of Algorithm 1 on CUDA are literal autograd's
SSIUU_DEVICE=cuda .venv/bin/python -m pytest -q tests/test_unlearn.py -k "literal or backbone or controls" > "$out/tests.txt"

# The default command on both: the rows should agree within the intervals, CUDA adds in another order
.venv/bin/python ssiuu.py --device cuda > "$out/default-cuda.txt"
.venv/bin/python ssiuu.py --device cpu > "$out/default-cpu.txt"

# Seconds, tokens/s and peak memory of a 3B step; without --offload SSIUU may not fit
for config in llama-3.2-3b qwen2.5-3b; do
    for flags in "--offload" "" "--literal"; do
        .venv/bin/python data/results/bench.py --config $config --device cuda --batch-size 33 --micro-batch 4 $flags \
            --out "$out/$config$flags.json" > "$out/$config$flags.txt" 2>&1 || echo "$config $flags failed" >> "$out/failed.txt"
    done
done
