#!/usr/bin/env bash
# Trains on several machines: start it on each of them, with the same arguments. They meet at RENDEZVOUS, a host and port
# of one of them, and write to one shared output_dir.
#   MACHINES=2 RENDEZVOUS=node1:29500 scripts/train_several_machines.sh configs/pretrain_wikipedia.yaml
# PROCESSES sets the processes of a machine (one for each GPU).
set -euo pipefail

config=${1:?usage: train_several_machines.sh CONFIG [KEY=VALUE]...}
shift
machines=${MACHINES:?set MACHINES to their number}
rendezvous=${RENDEZVOUS:?set RENDEZVOUS to HOST:PORT of one of them}
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
# Ctrl-C and SIGTERM save first: torchrun would kill what is not done with it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec torchrun --nnodes="$machines" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_endpoint="$rendezvous" --rdzv_id="${RUN_ID:-fusiontree}" \
    -m fusiontree train --config "$config" --resume auto system.num_devices=$((machines * processes)) "$@"
