#!/bin/bash
# llama3_8b on v5p-64: 4×4×2 v5p chips: 32 chips, 64 cores, 8 hosts of 4
# Runs on every worker. The machine's own metadata tells JAX of the others.
# To stop, state saved: pkill -TERM -f 'bash [m]axlm-llama.sh' on every worker.
# One at a time: the lock is held until what it started has ended as well.
exec 9> "${TMPDIR:-/tmp}/maxlm-llama.lock"
flock --nonblock 9 || { echo "maxlm-llama.sh runs here already" >&2; exit 2; }
train() {
  exec /opt/maxlm/bin/maxlm train llama3_8b 'data.sources=[{store: gs://corpus/tokens}]' folder=/nfs/runs tokenizer.path=/nfs/tokenizer train.micro_batches=4
}
stopping='' pid=''
trap 'stopping=yes; [[ ! $pid ]] || kill -TERM "$pid"' TERM INT USR1
for ((restart = 0; restart <= 100; restart++)); do
  train &
  pid=$!
  [[ ! $stopping ]] || kill -TERM "$pid"
  # A signal ends a wait, not what is waited for.
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done
  wait "$pid"
  code=$?
  pid=
  [[ ! $stopping ]] || exit "$code"
  # 75: stopped in time, state saved. 76, or the code of a signal: a process hung or died.
  [[ $code -eq 75 || $code -eq 76 || $code -gt 128 ]] || exit "$code"
  sleep 10
  [[ ! $stopping ]] || exit "$code"
done
exit "$code"
