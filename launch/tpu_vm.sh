#!/usr/bin/env bash
# A TPU VM slice: the same command on every host, started again when a host is lost.
#   launch/tpu_vm.sh NAME ZONE --config=configs/lavin7b_eim_scienceqa.py --workdir=/mnt/shared/runs/lavin
# Once before, on all hosts: clone the repository into ~/eim_jax and `make install EXTRAS=tpu` there. The workdir is on a
# file system that all hosts mount (Filestore); training data may lie in a mounted bucket (--mode=prepare writes it so).
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf '%q ' "$@")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

# Ten starts at most, so that a mistake in the command does not come back for ever.
for start in 1 2 3 4 5 6 7 8 9 10; do
  echo "start $start"
  if on_all_hosts "cd eim_jax && echo \$\$ >started.pid && exec .venv/bin/python -m eim_jax.main $arguments"; then
    exit 0
  fi
  # Processes that wait for a lost one end by themselves; one that is left would hold the chips. Only the one started
  # above is ended, and only while its number still belongs to it.
  # shellcheck disable=SC2016  # the hosts' shells expand it
  on_all_hosts 'cd eim_jax && pid=$(cat started.pid) && grep -q eim_jax "/proc/$pid/cmdline" && kill -9 "$pid" || true'
done
exit 1
