#!/usr/bin/env bash
# The whole SPARK demo on digits, with the weights sharded over two CPU processes (DeepSpeed ZeRO-3 over gloo): all that
# a large run does, in a few minutes and without a GPU.
#
#     scripts/launch/spark_tiny_cpu.sh [option of `spark-vl train` ...]
#
# Started again, it goes on from its latest checkpoint. Needs a C++ compiler, for DeepSpeed builds a part of itself.
#
# Variables, with their defaults (paths start from the repository's root):
#   OUTPUT_DIR=runs/digits-zero3                     folder of the run
#   CONFIG=scripts/configs/digits/spark.yaml         settings of the run
#   LAUNCH=scripts/accelerate/zero3_cpu.yaml         how processes are started, and the weights held
#   PROCESSES=2
#
# Examples:
#   scripts/launch/spark_tiny_cpu.sh
#   OUTPUT_DIR=runs/short scripts/launch/spark_tiny_cpu.sh --steps 10 --evaluation.recipes '[]'
#   OUTPUT_DIR=runs/ddp LAUNCH=scripts/accelerate/ddp.yaml scripts/launch/spark_tiny_cpu.sh

# shellcheck source=scripts/launch/common.sh
source "$(dirname "$0")/common.sh"

OUTPUT_DIR=${OUTPUT_DIR:-runs/digits-zero3}
CONFIG=${CONFIG:-scripts/configs/digits/spark.yaml}
LAUNCH=${LAUNCH:-scripts/accelerate/zero3_cpu.yaml}
GPUS=${PROCESSES:-2}
# Also on a machine with GPUs, of which there may be one.
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
# Small tensors gain nothing from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
launch "$@"
