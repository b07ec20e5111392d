#!/usr/bin/env bash
# Everything that a GPU machine is asked, in 20 minutes: build, GPU tests, benchmark.
#   benchmarks/gpu.sh              results go to benchmarks/results/
#   benchmarks/gpu.sh --dry-run    the same steps on a CPU, tiny, results under /tmp
# Other arguments go to `python -m benchmarks.gpu`. Environment:
#   PYTHON          the interpreter (default: .venv/bin/python, else python3)
#   TEST_SECONDS    for the tests, 0 to leave them out (default: 420)
#   WITHOUT_TRITON  1: the tests run in a process that cannot import Triton
#   BENCH_MINUTES   for the benchmark, 0 to leave it out (default: 11)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TEST_SECONDS=${TEST_SECONDS:-420}
BENCH_MINUTES=${BENCH_MINUTES:-11}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "[$(date +%H:%M:%S)] $*"; }

# looking at the backends also builds the extension where none is installed
say "$("$PYTHON" --version 2>&1), $PYTHON"
"$PYTHON" - <<'PY' || exit 1
import torch

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"torch {torch.__version__}, {gpu}")
import spo_kernels

for name, status in spo_kernels.backend_info().items():
    print(f"backend {name}: {'yes' if status.available else 'no'}: {status.detail}")
PY

SELECTION=(-m gpu)
RESULTS=benchmarks/results
for argument in "$@"; do
    if [ "$argument" = "--dry-run" ]; then
        # a test of the tests: some of those that need no CUDA
        export SPO_GPU_DRY_RUN=1 TRITON_INTERPRET=1
        SELECTION=(-k "any_width or fused or sums or odd" -W ignore::RuntimeWarning)
        RESULTS=${TMPDIR:-/tmp}/spo-gpu-dry-run
    fi
done
mkdir -p "$RESULTS"

TESTS=0
NOTE="GPU tests were not run"
if [ "$TEST_SECONDS" -gt 0 ]; then
    LOG=$RESULTS/gpu-tests.log
    say "GPU tests, at most $TEST_SECONDS s, log in $LOG"
    RUNNER=(-m pytest)
    [ "${WITHOUT_TRITON:-0}" = 1 ] && RUNNER=(tests/without_triton.py)
    timeout "$TEST_SECONDS" "$PYTHON" "${RUNNER[@]}" -q -p no:cacheprovider -p no:xdist "${SELECTION[@]}" \
        tests/test_gpu.py tests/test_gpu_sparsity.py tests/test_gpu_system.py tests/test_cuda_kernels.py >"$LOG" 2>&1
    TESTS=$?
    tail -n 25 "$LOG"
    case $TESTS in
        0) NOTE="GPU tests passed: $(tail -n 1 "$LOG")" ;;
        124) NOTE="GPU TESTS DID NOT END within $TEST_SECONDS s" ;;
        *) NOTE="GPU TESTS FAILED: $(tail -n 1 "$LOG")" ;;
    esac
fi
say "$NOTE"

BENCH=0
if [ "$BENCH_MINUTES" -gt 0 ]; then
    say "benchmark, at most $BENCH_MINUTES minutes"
    "$PYTHON" -m benchmarks.gpu --minutes "$BENCH_MINUTES" --note "$NOTE" "$@"
    BENCH=$?
fi
say "done: tests $TESTS, benchmark $BENCH"
[ "$TESTS" -eq 0 ] && [ "$BENCH" -eq 0 ]
