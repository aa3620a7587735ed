#!/usr/bin/env bash
# Slurm on this machine alone, to try out and test jobs. Needs root; installs Debian's slurm-wlm if it is missing.
#
#   bash scripts/slurm_single_machine.sh start             start it, and tell how to use it
#   bash scripts/slurm_single_machine.sh stop              end its jobs and daemons, and remove its folder
#   bash scripts/slurm_single_machine.sh run COMMAND...    start it, run the command in it, stop it
#
# SLURM_SINGLE_MACHINE names its folder (/tmp/slurm_single_machine), where all of its files are. It offers 8 CPUs,
# whatever the machine has, and one pretended GPU. Another Slurm that runs here is left alone.
# Exit code: 75 if Slurm cannot run here, with the reason in one line; run: that of the command.
set -euo pipefail
folder=${SLURM_SINGLE_MACHINE:-/tmp/slurm_single_machine}
export SLURM_CONF=$folder/slurm.conf PATH=$PATH:/usr/sbin:/sbin
cannot() { echo "Slurm cannot run here: $*" >&2; exit 75; }

# sinfo itself would wait for minutes.
running() { [[ -f $SLURM_CONF ]] && timeout 5 sinfo -h -o %T 2>/dev/null | grep -qE '^(idle|mixed|allocated|completing)$'; }

# The number could be another process's by now; one that has ended, and is not yet collected, has no command line.
is_alive() { tr '\0' ' ' 2>/dev/null < "/proc/$2/cmdline" | grep -q "$1"; }

stop() {
    # Nobody else's folder is removed.
    [[ -f $SLURM_CONF && $(head -n 1 "$SLURM_CONF") == ClusterName=single_machine ]] || return 0
    if running; then
        timeout 10 scancel --user="$(id -un)" || true
        for _ in {1..50}; do [[ -z $(timeout 5 squeue -h 2>/dev/null) ]] && break; sleep 0.1; done
    fi
    local daemon pid
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$folder/$daemon.pid" 2>/dev/null) || continue
        is_alive "$daemon" "$pid" && kill "$pid"
        for _ in {1..100}; do is_alive "$daemon" "$pid" || continue 2; sleep 0.1; done
        kill -KILL "$pid"
    done
    rm -rf "$folder"
}

install_packages() {
    type -P munged sbatch slurmctld slurmd > /dev/null && return
    type -P apt-get > /dev/null || cannot "it is not installed, and there is no apt-get. Install slurm-wlm and munge"
    echo "Installing slurm-wlm and munge" >&2
    local log
    log=$({ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurm-wlm munge; } 2>&1) || cannot "apt-get failed: $(grep -E '^(E|Err):?' <<< "$log" | head -n 1)"
}

free_port() {
    local port
    while port=$(($1 + RANDOM % 5000)); (: < "/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo $port
}

start() {
    running && return
    [[ $(id -u) == 0 ]] || cannot "it needs root"
    install_packages
    stop
    mkdir -p "$folder"
    [[ -z $(ls -A "$folder") ]] || cannot "$folder is not empty. Remove it, or name another folder"
    mkdir "$folder/state" "$folder/spool"
    chmod 755 "$folder"
    local host
    host=$(hostname -s)
    cat > "$SLURM_CONF" <<END
ClusterName=single_machine
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port 20000)
SlurmdPort=$(free_port 25000)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
    echo "NodeName=$host Name=gpu File=/dev/null" > "$folder/gres.conf"
    (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
    local started=true deadline=$((SECONDS + 30))
    {
        munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
            --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" &&
            slurmctld && slurmd
    } > "$folder/start.log" 2>&1 || started=false
    while $started && ((SECONDS < deadline)); do
        running && return
        sleep 0.1
    done
    local reason
    reason=$(cat "$folder"/{start,munged,slurmctld,slurmd}.log 2>/dev/null | grep -E 'fatal|Error' | tail -n 1) || true
    stop
    cannot "${reason:-its node did not become idle within 30 seconds}"
}

case ${1-} in
    start)
        start
        echo "Slurm is running, partition main. To use it: export SLURM_CONF=$SLURM_CONF"
        echo "To end it: SLURM_SINGLE_MACHINE=$folder bash $0 stop"
        ;;
    stop) stop ;;
    run)
        shift
        [[ $# -gt 0 ]] || { echo "Error: run needs a command" >&2; exit 2; }
        running || trap stop EXIT
        start
        "$@"
        ;;
    *)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
        exit 2
        ;;
esac
