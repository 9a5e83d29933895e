# shellcheck shell=bash
# What the launch scripts share. A script sources this with its arguments, sets its variables, and ends with `launch`.
set -euo pipefail

case "${1:-}" in
    -h | --help) # the comments at its top
        awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
        exit
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# launch [option of `spark-vl train` ...]: CONFIG into OUTPUT_DIR, by LAUNCH on GPUS × MACHINES processes, sampled by
# ROLLOUT if it is set.
# Takes the place of the shell.
launch() {
    local file recipes machines=()
    IFS=, read -ra recipes <<< "${RECIPES:-}"
    for file in "$CONFIG" "$LAUNCH" "${recipes[@]}"; do
        # A recipe may be a name, too.
        [[ -f $file || $file != *.yaml ]] || die "there is no file $file (paths start from $PWD)"
    done
    command -v accelerate > /dev/null || PATH=$PWD/.venv/bin:$PATH
    command -v accelerate > /dev/null || die "there is no command accelerate; pip install -e . -c constraints.txt"
    if [ "${MACHINES:=1}" -gt 1 ]; then
        : "${MACHINE_RANK:?is not set: 0 on the first of the $MACHINES machines, then 1, 2, ...}"
        : "${MAIN_IP:?is not set: name or address of the first of the $MACHINES machines}"
        machines=(--num_machines "$MACHINES" --machine_rank "$MACHINE_RANK" --rdzv_backend static --same_network
            --main_process_ip "$MAIN_IP" --main_process_port "${MAIN_PORT:-29500}"
            --deepspeed_multinode_launcher standard)
    fi
    # As many threads as there are cores: images, and an optimizer in host memory. Accelerate would make it one.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > GPUS ? $(nproc) / GPUS : 1))}
    # After SIGINT and SIGTERM torch's launcher gives a run 30 s, too few to end a step and save.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
    # It does not know USR1, which would kill it. What is ignored stays ignored in the program that takes the shell's
    # place, and in those that it starts; the training processes listen again (spark_vl/distributed/stop.py).
    trap '' USR1
    exec accelerate launch --config_file "$LAUNCH" --num_processes "$((GPUS * MACHINES))" "${machines[@]}" \
        -m spark_vl train --config "$CONFIG" --output_dir "$OUTPUT_DIR" --resume auto \
        ${ROLLOUT:+--rollout.engine "$ROLLOUT"} "$@"
}
