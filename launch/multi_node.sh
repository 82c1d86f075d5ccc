#!/usr/bin/env bash
# The a100 recipe on the GPUs of several machines; on each of them, with its number from 0:
#   NODES=2 NODE=0 FIRST_NODE=10.0.0.1 bash launch/multi_node.sh --data.path reports/ --checkpoint.mirror s3://BUCKET/run
# Where one dies, the others start again, and wait for it, or another with its number: docs/DISTRIBUTED.md
. "$(dirname "$0")/_common.sh"
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; } # 08 and 1.5 would end the arithmetic below, and then train alone
if ! { is_number "${NODES:-}" && is_number "${NODE:-}" && [[ ${FIRST_NODE:-} ]]; } || [ "$NODE" -ge "$NODES" ]; then
    echo "set NODES (how many machines), NODE (this one's number, from 0) and FIRST_NODE (the address of number 0)" >&2
    exit 78
fi
for name in PROCESSES SECONDS_TO_MEET PORT; do
    [ -z "${!name:-}" ] || is_number "${!name}" ||
        { echo "$name=${!name} is no whole number; unset it, or write one such as $name=8" >&2; exit 78; }
done
gpus=${PROCESSES:-$(.venv/bin/python -c "import torch; print(torch.cuda.device_count())")}
if [ "$gpus" -lt 1 ]; then
    echo "multi_node needs a GPU on each machine, as many on one as on another, and torch finds none" >&2
    exit 78
fi
SECONDS_TO_MEET=${SECONDS_TO_MEET:-3600} # for which a machine waits for the others before it gives up
MOST_RESTARTS=100                        # what comes again and again wants less memory or another machine
is_host=$([ "$NODE" = 0 ] && echo true || echo false)
topology=(--num_machines "$NODES" --machine_rank "$NODE" --num_processes $((NODES * gpus)))
topology+=(--main_process_ip "$FIRST_NODE" --main_process_port "${PORT:-29500}")
topology+=(--rdzv_conf "is_host=$is_host,join_timeout=$SECONDS_TO_MEET,read_timeout=$SECONDS_TO_MEET")

asked=
for ((start = 0; start <= MOST_RESTARTS; start++)); do
    launch multi_node_ddp.yaml multi_gpu "$@" &
    launcher=$!
    for number in TERM INT USR1 HUP; do
        # shellcheck disable=SC2064
        trap "asked=yes; interrupted=yes; kill -$number $launcher 2>/dev/null || true" "$number"
    done
    interrupted=yes
    while [ "$interrupted" ]; do # a signal ends `wait`, though not the launcher
        interrupted=
        wait "$launcher" && code=0 || code=$?
    done
    case $code in
        75 | 81 | 83) [ -z "$asked" ] || exit "$code" ;; # another machine was asked to stop, or is lost
        *) exit "$code" ;;
    esac
    echo "multi_node: ended with $code, starting again" >&2
    sleep 5
done
exit "$code"
