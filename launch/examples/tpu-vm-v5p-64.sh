#!/bin/bash
# llama3_8b on v5p-64: 4×4×2 v5p chips: 32 chips, 64 cores, 8 hosts of 4
# Runs on every worker. JAX finds the other workers in the TPU's metadata.
# To save and stop: pkill -TERM -f 'bash [m]axlm-llama.sh' on every worker.
# Only one runs at a time: the processes that it starts hold the lock too.
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
  # A signal interrupts `wait` but not the process.
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done
  wait "$pid"
  code=$?
  pid=
  [[ ! $stopping ]] || exit "$code"
  # 75: preempted, state saved. 76 or a signal's code: a process hung or died.
  [[ $code -eq 75 || $code -eq 76 || $code -gt 128 ]] || exit "$code"
  sleep 10
  [[ ! $stopping ]] || exit "$code"
done
exit "$code"
