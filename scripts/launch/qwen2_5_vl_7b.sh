#!/usr/bin/env bash
# SPARK on Qwen2.5-VL-7B with our settings, the weights sharded over 8 GPUs of one machine (ZeRO-3).
#
#     RECIPES=... scripts/launch/qwen2_5_vl_7b.sh [option of `spark-vl train` ...]
#
# Started again, it goes on from its latest checkpoint. By `spark-vl estimate` a GPU needs 66 GiB, 15 of them for all
# weights while it samples, 27 for its completions: with smaller ones, lower rollout.decode_batch_size first.
#
# Variables (paths start from the repository's root):
#   RECIPES         what to train on: names of recipes, or recipe files, with commas between. Images of ViRL39K, the
#                   paper's problems, have to be unpacked first: see data_recipes/virl39k.yaml
# and, with their defaults:
#   OUTPUT_DIR=runs/qwen2_5_vl_7b-spark              folder of the run
#   CONFIG=scripts/configs/qwen2_5_vl_7b/spark.yaml  settings of the run
#   LAUNCH=scripts/accelerate/zero3.yaml             how processes are started, and the weights held
#   GPUS=8                                           of one machine
#   ROLLOUT=transformers                             what samples; vllm: see docs/rollouts.md (not run on a GPU yet)
# With MACHINES=2 or more (LAUNCH is then multinode_zero3.yaml) start it on each of them, with MACHINE_RANK=0, 1, ...
# and MAIN_IP, the address of the first; on SLURM, slurm.sbatch does that.
#
# Examples:
#   RECIPES=my_virl39k.yaml scripts/launch/qwen2_5_vl_7b.sh
#   ROLLOUT=vllm RECIPES=my_virl39k.yaml scripts/launch/qwen2_5_vl_7b.sh
#   RECIPES=geometry3k GPUS=4 scripts/launch/qwen2_5_vl_7b.sh --rollout.decode_batch_size 64 --optimizer.lr 1e-6
#   RECIPES=my_virl.yaml CONFIG=scripts/configs/qwen2_5_vl_7b/released.yaml OUTPUT_DIR=runs/7b-released \
#       scripts/launch/qwen2_5_vl_7b.sh                                                       # the released run
#   RECIPES=my_virl39k.yaml OUTPUT_DIR=runs/7b-grpo scripts/launch/qwen2_5_vl_7b.sh --recycle.schedule none   # control
#   RECIPES=geometry3k CONFIG=scripts/configs/qwen2_5_vl_3b/spark.yaml OUTPUT_DIR=runs/3b \
#       scripts/launch/qwen2_5_vl_7b.sh

# shellcheck source=scripts/launch/common.sh
source "$(dirname "$0")/common.sh"

: "${RECIPES:?is not set: what to train on, such as RECIPES=geometry3k or RECIPES=my_virl39k.yaml (see --help)}"
OUTPUT_DIR=${OUTPUT_DIR:-runs/qwen2_5_vl_7b-spark}
CONFIG=${CONFIG:-scripts/configs/qwen2_5_vl_7b/spark.yaml}
MACHINES=${MACHINES:-1}
LAUNCH=${LAUNCH:-scripts/accelerate/$([ "$MACHINES" = 1 ] || echo multinode_)zero3.yaml}
GPUS=${GPUS:-8}
launch --data.recipes "[$RECIPES]" "$@"
