#!/usr/bin/env bash
# Trains on several hosts that ssh reaches without a password: one process a host, which uses all its GPUs.
#
#   launch/ssh.sh HOST... -- --config FILE [--SECTION.FIELD VALUE ...]
#   launch/ssh.sh -f HOSTFILE -- --config FILE [--SECTION.FIELD VALUE ...]
#
# HOSTFILE has a host a line (its first word); # starts a comment. What follows -- goes to scripts/train.py. All hosts
# must have the checkout, the virtual environment, the text and the checkpoint folder under the same paths.
#
# Ctrl-C (or TERM, HUP, USR1) stops all: they save and end with 75, and the same command goes on. A second one, after
# two seconds or more, ends them at once. If one fails, the others are ended. The exit code is 0, or 75 if the run can
# go on, or that of the first to fail.
#
# Needs bash 4.4 or later here and on the hosts.
set -euo pipefail

repo=${JAXLM_REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)} # the checkout, on every host
python=${JAXLM_VENV:+$JAXLM_VENV/bin/}python
port=${JAXLM_PORT:-8476}                        # free on the first host, reachable from the others
coordinator=${JAXLM_COORDINATOR:-}              # the first host, as the others call it
read -r -a exported <<<"${JAXLM_ENV:-}" || true # names of variables to set on the hosts too
grace=${JAXLM_GRACE:-60}                        # seconds from a failure to the killing of those that are still there
# Without a terminal, so that Ctrl-C is ours to hand on; a host that is silent for a minute has failed.
read -r -a ssh <<<"${JAXLM_SSH:-ssh -T -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4}"

die() {
  echo "error: $*" >&2
  exit 2
}

hosts=()
while (($#)); do
  case $1 in
    -f)
      (($# > 1)) || die "-f: names no file"
      [[ -r $2 ]] || die "-f ($2): can't be read"
      while read -r host _ || [[ -n $host ]]; do
        [[ -z $host || $host == \#* ]] || hosts+=("$host")
      done <"$2"
      shift
      ;;
    --) break ;;
    -*) die "$1: unknown option; those of scripts/train.py go after --" ;;
    *) hosts+=("$1") ;;
  esac
  shift
done
((${#hosts[@]})) || die "no hosts: launch/ssh.sh HOST... -- --config FILE"
[[ ${1:-} == -- && $# -gt 1 ]] || die "no command: launch/ssh.sh HOST... -- --config FILE"
shift
arguments=("$@")
coordinator=${coordinator:-${hosts[0]#*@}}

# On the host: runs the command "$@". ssh hands no signals on, so they come as lines on stdin, by name. The end of stdin
# is the launcher's death or a broken connection: then the run saves and ends, rather than go on unseen.
# shellcheck disable=SC2329 # called there, by what script() writes
on_host() {
  exec 3<&0
  "$@" </dev/null 3<&- &
  local process=$! code=0 name
  {
    while read -r name <&3; do kill -s "$name" "$process"; done
    kill -s TERM "$process"
  } 2>/dev/null &
  local listener=$!
  disown
  wait "$process" || code=$?
  kill "$listener" 2>/dev/null || true
  exit "$code"
}

# What the bash on a host is given to read. All quoting is bash's own, whatever the login shell is.
script() { # process id
  declare -f on_host
  local name
  for name in "${exported[@]}"; do printf 'export %s=%q\n' "$name" "${!name-}"; done
  printf 'cd %q || exit 2\non_host' "$repo"
  printf ' %q' "$python" scripts/train.py "${arguments[@]}" --coordinator_address "$coordinator:$port" \
    --num_processes "${#hosts[@]}" --process_id "$1"
  echo
}

prefixed() { # label
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/ended" # takes a line "process code" as each ends
exec {ended}<>"$folder/ended"
lines=()   # descriptors that lead to the processes' stdin
running=() # what waits here for each process: its pid

start() { # process id
  mkfifo "$folder/$1"
  (
    # What is sent to all of the process group, as Ctrl-C is, must not end ssh: it has the last of the output to carry.
    trap '' INT TERM HUP USR1
    # A process must see the end of its stdin when the launcher dies, so no other may hold that open.
    for line in "${lines[@]}"; do exec {line}>&-; done
    set +e
    "${ssh[@]}" "${hosts[$1]}" bash -s <"$folder/$1" 2>&1 | prefixed "$1 ${hosts[$1]}"
    echo "$1 ${PIPESTATUS[0]}" >"$folder/ended"
  ) &
  running[$1]=$!
  local line
  exec {line}<>"$folder/$1" # for reading too: then opening and writing never block, or fail when ssh is gone
  lines+=("$line")
  script "$1" >&"$line"
}

tell_all() { # signal
  local line
  for line in "${lines[@]}"; do echo "$1" >&"$line"; done
}

for process in "${!hosts[@]}"; do start "$process"; done

asked=''
# shellcheck disable=SC2329 # called by the trap
on_signal() {
  # Who signals a process group and its leader too, as timeout(1) does, means it once.
  if [[ -n $asked ]] && ((SECONDS < asked + 2)); then return 0; fi # alone, it returns what was interrupted
  asked=$SECONDS
  tell_all TERM
  echo "ssh.sh: stopping all" >&2 || true # the terminal may be gone
}
trap on_signal INT TERM HUP USR1

failure='' resumable='' deadline=''
on_end() { # process, code
  unset "running[$1]"
  if (($2 == 75)); then
    resumable=75
  elif (($2 != 0)) && [[ -z $failure ]]; then
    failure=$2
    deadline=$((SECONDS + grace))
    if [[ -z $asked ]]; then tell_all TERM; fi # a second signal would cut a save short
    echo "ssh.sh: process $1 on ${hosts[$1]} ended with $2; ending the others" >&2 || true
  fi
}

# Until a process has ended, a signal has come, or half a second is over, for the deadline.
timer=''
wait_a_moment() {
  if [[ -z $timer ]] || ! kill -0 "$timer" 2>/dev/null; then
    (
      trap '' INT TERM HUP USR1 # or bash would tell of its end
      for line in "${lines[@]}"; do exec {line}>&-; done
      exec sleep 0.5 >/dev/null 2>&1
    ) &
    timer=$!
  fi
  wait -n || true
}

while ((${#running[@]})); do
  wait_a_moment
  gone=()
  for process in "${!running[@]}"; do
    kill -0 "${running[$process]}" 2>/dev/null || gone+=("$process")
  done
  # The read that takes a line has no timeout: one that runs out within a line has taken half of it.
  while read -r -t 0 -u "$ended"; do
    read -r -u "$ended" process code
    on_end "$process" "$code"
  done
  for process in "${gone[@]}"; do
    if [[ -n ${running[$process]:-} ]]; then on_end "$process" 255; fi # killed before it could tell
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#running[@]})); then
    deadline=''
    tell_all KILL
    echo "ssh.sh: killing those that are left" >&2 || true
  fi
done
exit "${failure:-${resumable:-0}}"
