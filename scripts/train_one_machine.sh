#!/usr/bin/env bash
# Trains on this machine's GPUs, one process each. What follows the configuration overrides it:
#   scripts/train_one_machine.sh configs/pretrain_wikipedia.yaml training.max_steps=100
# PROCESSES sets how many; without a GPU it is needed (processes on the CPU, over gloo).
set -euo pipefail

config=${1:?usage: train_one_machine.sh CONFIG [KEY=VALUE]...}
shift
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
# --resume auto: a run that was stopped, by whatever, goes on where it was saved.
# Ctrl-C and SIGTERM save first: torchrun would kill what is not done with it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec torchrun --standalone --nproc_per_node="$processes" -m fusiontree train \
    --config "$config" --resume auto system.num_devices="$processes" "$@"
