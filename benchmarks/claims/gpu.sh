#!/usr/bin/env bash
# Every claim script on one GPU, several processes at a time: benchmarks/claims/gpu.sh OUT [WORKERS] [NAME...]
set -uo pipefail
cd "$(dirname "$0")"
out=$1 workers=${2:-8}
shift $(($# < 2 ? $# : 2))
mkdir -p "$out/log"
[ $# -gt 0 ] || set -- $(grep -l "^def main" ./*.py | sed 's|./||; s|.py$||')
printf '%s\n' "$@" | OMP_NUM_THREADS=2 xargs -P "$workers" -I{} sh -c \
    "python3 {}.py --device cuda --out '$out' >'$out/log/{}.txt' 2>&1; echo \"{} \$?\""
