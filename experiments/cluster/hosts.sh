#!/usr/bin/env bash
# Runs one command as several processes that know of each other: over ssh, or on this machine.
set -euo pipefail
set -m # each process in a group of its own, so that only this script hears Ctrl-C

usage() {
  cat <<'TEXT'
Runs a command on several hosts, with --coordinator, --num-processes and --process-id added.

  hosts.sh HOST,HOST,...  COMMAND ...
  hosts.sh --hosts FILE   COMMAND ...     one host a line; a line with # is a comment
  hosts.sh --local N      COMMAND ...     N processes on this machine

  hosts.sh node1,node2 python -m attnx.train --config configs/copying.py --workdir /shared/run

Process i runs on host i, in a directory of the same path as here; the others must reach the first
host by the name given. Each line of process i is shown after "i| ". When one ends with an error,
the others have GRACE seconds to end by themselves, which attnx does with a sentence; then they are
killed. Ctrl-C and SIGTERM become a SIGTERM of all, upon which attnx saves and stops; a second one
kills. The exit code is the first that is not 0.

Environment:
  PORT     of the coordinator, on the first host (12355; with --local, one that is free)
  GRACE    seconds (90, which is more than the --patience of attnx)
  SSH      how to reach a host (ssh -o BatchMode=yes)
  FORWARD  names of variables that the hosts get
           (JAX_PLATFORMS XLA_FLAGS PYTHONPATH PYTHONUNBUFFERED, those that are set)
TEXT
}

fail() {
  echo "hosts.sh: $1" >&2
  exit 2
}

hosts=()
local=false
case "${1-}" in
  -h | --help | "")
    usage
    exit 0 ;;
  --local)
    [[ "${2-}" =~ ^[1-9][0-9]*$ ]] || fail "--local wants the number of processes"
    local=true
    for ((i = 0; i < $2; i++)); do hosts+=(127.0.0.1); done
    shift 2 ;;
  --hosts)
    [[ -r "${2-}" ]] || fail "--hosts wants a file that can be read"
    while read -r host _ || [[ -n "$host" ]]; do
      [[ -z "$host" || "$host" == \#* ]] || hosts+=("$host")
    done < "$2"
    shift 2 ;;
  -*) fail "there is no option $1; see --help" ;;
  *)
    IFS=, read -r -a hosts <<< "$1"
    shift ;;
esac
[[ ${#hosts[@]} -gt 0 ]] || fail "no hosts are given"
[[ $# -gt 0 ]] || fail "what shall the hosts run? see --help"

port=${PORT:-12355}
if $local && [[ -z "${PORT-}" ]]; then
  port=$(python3 -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
fi
grace=${GRACE:-90}
read -r -a ssh <<< "${SSH:-ssh -o BatchMode=yes}"
read -r -a forward <<< "${FORWARD:-JAX_PLATFORMS XLA_FLAGS PYTHONPATH PYTHONUNBUFFERED}"
coordinator="${hosts[0]##*@}:$port" # without the user of user@host
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Process $1, of the command that follows. Over ssh it first says its number, by which it can be sent
# signals: they do not travel with a connection.
run() {
  local i=$1 line name
  shift
  local command=("$@" "--coordinator=$coordinator" "--num-processes=${#hosts[@]}" "--process-id=$i")
  if $local; then
    exec "${command[@]}" < /dev/null
  fi
  line="cd $(printf %q "$PWD")"
  for name in "${forward[@]}"; do
    [[ -z "${!name+set}" ]] || line+=" && export $(printf %q "$name=${!name}")"
  done
  line+=" && echo \"hosts.sh: \$\$\" && exec $(printf '%q ' "${command[@]}")"
  exec "${ssh[@]}" "${hosts[i]}" "bash -c $(printf %q "$line")" < /dev/null
}

# The lines of process $1, with its number before each.
prefixed() {
  local line
  while IFS= read -r line || [[ -n "$line" ]]; do
    if [[ "$line" =~ ^hosts\.sh:\ ([0-9]+)$ ]]; then
      echo "${BASH_REMATCH[1]}" > "$scratch/$1.pid"
    else
      printf '%s| %s\n' "$1" "$line"
    fi
  done
}

# Signal $1 to every process that still runs.
tell() {
  local i
  for i in "${!pids[@]}"; do
    if ! $local && [[ -s "$scratch/$i.pid" ]]; then
      "${ssh[@]}" "${hosts[i]}" "kill -$1 $(< "$scratch/$i.pid")" < /dev/null 2> /dev/null &
      speakers+=($!)
      sleep 0.1
    fi
    if $local || [[ $1 == KILL ]]; then
      kill "-$1" "${pids[i]}" 2> /dev/null || true
    fi
  done
}

interrupted() {
  if $asked; then tell KILL; else tell TERM; fi
  asked=true
}

pids=()
speakers=()
asked=false
for i in "${!hosts[@]}"; do
  mkfifo "$scratch/$i"
  prefixed "$i" < "$scratch/$i" &
  speakers+=($!)
  run "$i" "$@" > "$scratch/$i" 2>&1 &
  pids[i]=$!
done
trap interrupted INT TERM

code=0
deadline=
while [[ ${#pids[@]} -gt 0 ]]; do
  for i in "${!pids[@]}"; do
    if ! kill -0 "${pids[i]}" 2> /dev/null; then
      status=0
      wait "${pids[i]}" || status=$?
      unset "pids[$i]"
      if [[ $status -ne 0 && $code -eq 0 ]]; then
        code=$status
        deadline=$((SECONDS + grace))
        echo "hosts.sh: process $i on ${hosts[i]} ended with code $status" >&2
      fi
    fi
  done
  if [[ -n "$deadline" && $SECONDS -ge $deadline ]]; then
    tell KILL
    deadline=
  fi
  sleep 0.2 || true
done
wait "${speakers[@]}" || true
exit "$code"
