#!/usr/bin/env bash
# A real SLURM on this machine, for the tests: one controller, one node, no accounting database, nothing outside FOLDER.
#   cluster.sh start FOLDER   installs Debian's packages where they are missing (needs root), starts, waits until jobs can run
#   cluster.sh stop FOLDER    stops what `start` started
# Programs find it by SLURM_CONF=FOLDER/slurm.conf. Daemons run as the calling user, without systemd and cgroups.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

fail() { echo "cluster.sh: $*" >&2; exit 1; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

install_packages() {
  if command -v slurmctld slurmd munged sbatch >/dev/null; then return; fi
  command -v apt-get >/dev/null || fail "there is no SLURM, and no apt-get to install it with"
  [ "$(id -u)" = 0 ] || fail "there is no SLURM, and only root can install it: apt-get install slurm-wlm munge"
  export DEBIAN_FRONTEND=noninteractive
  (
    flock 9 # tests in another process may install a browser now
    apt-get update -qq >/dev/null || fail "apt-get update failed"
    # The packages' services would start on their own configuration in a full system; ours are started below.
    apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null || fail "slurm-wlm and munge cannot be installed"
  ) 9>/var/lock/molf-tests-apt
}

configure() {
  local host cpus memory
  host=$(hostname -s) cpus=$(nproc --all) memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  mkdir -p "$1/state" "$1/spool"
  head -c 1024 /dev/urandom >"$1/munge.key"
  chmod 600 "$1/munge.key"
  # cred_expire is also how long a requeued job waits before it may start again (5 is the least); jobs run as the controller's user.
  cat >"$1/slurm.conf" <<CONF
ClusterName=molf
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$1/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize=4
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=work Nodes=$host Default=YES MaxTime=60 PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=$host MaxTime=60 PriorityTier=2 PreemptMode=OFF State=UP
CONF
}

start() {
  install_packages
  configure "$1"
  export SLURM_CONF="$1/slurm.conf"
  munged --force --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \
    --log-file="$1/munged.log" --seed-file="$1/munged.seed" || fail "munged does not start: $(tail -5 "$1/munged.log")"
  slurmctld || fail "slurmctld does not start: $(tail -5 "$1/slurmctld.log")"
  slurmd || fail "slurmd does not start: $(tail -5 "$1/slurmd.log")"
  for _ in $(seq 60); do
    if sinfo --noheader --format %t 2>/dev/null | grep -q idle; then return; fi
    sleep 0.5
  done
  fail "the node does not come up: $(sinfo 2>&1; tail -5 "$1/slurmctld.log" "$1/slurmd.log")"
}

stop() {
  export SLURM_CONF="$1/slurm.conf"
  if [ -e "$1/slurmctld.pid" ]; then scancel --user="$(id -un)" --signal=KILL --full || true; fi
  for name in slurmd slurmctld munged; do
    if [ -e "$1/$name.pid" ]; then kill "$(cat "$1/$name.pid")" 2>/dev/null || true; fi
  done
}

[ $# = 2 ] || fail "usage: cluster.sh start|stop FOLDER"
folder=$(realpath -m "$2")
case $1 in
  start) mkdir -p "$folder"; start "$folder" ;;
  stop) stop "$folder" ;;
  *) fail "usage: cluster.sh start|stop FOLDER" ;;
esac
