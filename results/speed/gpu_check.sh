#!/usr/bin/env bash
# What needs a GPU, in about a quarter of an hour: `gpu_check.sh FOLDER [PARTS]` tests the head's kernel, the
# steps that make no host wait and the graphs of generation, then measures. FOLDER gets test.txt, a bench_*.txt and a
# bench.jsonl of each part. A part that fails leaves its message there, and the next one goes on. PARTS: only some.
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-out/gpu}")
parts=" ${2:-test head step gpt2 generate groups16 groups32 groups16_124M} "
mkdir -p "$out"
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"
tests() {
    [[ $parts == *" test "* ]] || return
    python3 -m pytest -q "$@" 2>&1 | tail -30 | tee -a "$out/test.txt"
}
tests tests/test_kernels.py tests/test_losses.py tests/test_model.py
tests tests/test_train.py tests/test_preference.py -k "host_does_not_wait or skipped_by"

bench() {
    name=$1
    [[ $parts == *" $name "* ]] || return
    shift
    echo "\$ python bench.py $*" | tee "$out/bench_$name.txt"
    timeout 200 python3 bench.py --repeats=9 --out_dir="$out/$name" "$@" 2>&1 | tee -a "$out/bench_$name.txt"
}
bench head --parts=head
bench step --parts=step --batch_size=128
bench gpt2 --parts=step --n_layer=12 --n_head=12 --n_embd=768 --batch_size=12 --block_size=1024
bench generate --parts=generate
bench groups16 --parts=preference,iteration --groups=16
bench groups32 --parts=preference --groups=32
bench groups16_124M --parts=preference --groups=16 --shape=12,12,768
