#!/usr/bin/env bash
# Checks and times hira on a CUDA machine that has torch, triton and transformers and needs no network.
#
#     benchmarks/gpu.sh pack            # where there is a network: puts hira, peft and what they need into gpu-files/
#     benchmarks/gpu.sh run OUT         # on the CUDA machine: checks every kernel, then times; JSON goes to the folder OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
pack)
    rm -rf gpu-files
    "${PYTHON:-python3}" -m pip install --quiet --no-deps --target gpu-files --constraint constraints.txt \
        . peft accelerate psutil typer rich markdown-it-py mdurl pygments click shellingham
    ;;
run)
    PYTHONPATH="$PWD/gpu-files:$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" benchmarks/gpu.py "${2:?a folder}"
    ;;
*)
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
