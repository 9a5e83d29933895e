#!/usr/bin/env bash
# SPARK on Qwen2.5-VL-32B with our settings: ZeRO-3, weights and optimizer in host memory.
#
#     RECIPES=... scripts/launch/qwen2_5_vl_32b.sh [option of `spark-vl train` ...]
#
# Started again, it goes on from its latest checkpoint.
#
# Why zero3_offload.yaml: weights, gradients, optimizer and reference are 78 GiB on each of 8 GPUs, and while it samples
# a GPU holds all weights, 62 GiB. What `spark-vl estimate` says of one GPU, with rollout.decode_batch_size 8 as configured:
#
#   zero3_offload, 8 GPUs or more                    74 GiB, and 783 GiB of host memory a machine (several: 530)
#   multinode_zero3, 16 GPUs                        113 GiB: for GPUs of 141 GB
#   multinode_zero3, 16 GPUs, rollout.gather layer   66 GiB: gathers all weights anew for each token, very slow
#   multinode_zero3, 128 GPUs                        79 GiB
#   zero3_offload, 8 GPUs, ROLLOUT=vllm              35 GiB, and 907 GiB of host memory
#
# None of them has been run yet.
#
# Variables (paths start from the repository's root):
#   RECIPES         what to train on: names of recipes, or recipe files, with commas between. Images of ViRL39K, the
#                   paper's problems, have to be unpacked first: see data_recipes/virl39k.yaml
# and, with their defaults:
#   OUTPUT_DIR=runs/qwen2_5_vl_32b-spark              folder of the run
#   CONFIG=scripts/configs/qwen2_5_vl_32b/spark.yaml  settings of the run
#   LAUNCH=scripts/accelerate/zero3_offload.yaml      how processes are started, and the weights held
#   GPUS=8                                            of one machine
#   ROLLOUT=transformers                              what samples; vllm: see docs/rollouts.md
# With MACHINES=2 or more start it on each of them, with MACHINE_RANK=0, 1, ... and MAIN_IP, the address of the first;
# on SLURM, slurm.sbatch does that.
#
# Examples:
#   RECIPES=my_virl39k.yaml scripts/launch/qwen2_5_vl_32b.sh
#   ROLLOUT=vllm RECIPES=my_virl39k.yaml scripts/launch/qwen2_5_vl_32b.sh
#   MACHINES=2 MACHINE_RANK=0 MAIN_IP=10.0.0.1 LAUNCH=scripts/accelerate/multinode_zero3.yaml RECIPES=my_virl39k.yaml \
#       scripts/launch/qwen2_5_vl_32b.sh --rollout.gather layer --rollout.decode_batch_size 32

# shellcheck source=scripts/launch/common.sh
source "$(dirname "$0")/common.sh"

: "${RECIPES:?is not set: what to train on, such as RECIPES=geometry3k or RECIPES=my_virl39k.yaml (see --help)}"
OUTPUT_DIR=${OUTPUT_DIR:-runs/qwen2_5_vl_32b-spark}
CONFIG=${CONFIG:-scripts/configs/qwen2_5_vl_32b/spark.yaml}
LAUNCH=${LAUNCH:-scripts/accelerate/zero3_offload.yaml}
GPUS=${GPUS:-8}
# A GPU's share has no room for all weights. The configuration decodes one group at a time, for memory that vLLM shares
# out itself.
[ "${ROLLOUT:-}" != vllm ] || set -- --rollout.vllm.tensor_parallel 4 --rollout.decode_batch_size 128 "$@"
launch --data.recipes "[$RECIPES]" "$@"
