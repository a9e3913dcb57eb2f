#!/usr/bin/env bash
# One session on a lent GPU: correctness, every shape, all peers, results to --output_dir (default $OUT).
#
#   benchmarks/gpu_session.sh prepare          here, with a network: wheels of the pinned peers and the
#                                              commit's name into outputs/gpu (carry that folder along)
#   benchmarks/gpu_session.sh [--smoke] [...]  there: installs what outputs/gpu holds into a private
#                                              folder, without touching torch, then measures
set -euo pipefail
cd "$(dirname "$0")/.."
folder=outputs/gpu

if [[ "${1:-}" == prepare ]]; then
    mkdir -p "$folder"
    # peers, and the small pure-Python packages that importing TRL needs and the GPU image lacks
    rm -f "$folder"/*.whl
    python -m pip download --no-deps --only-binary :all: --dest "$folder" \
        --python-version "${GPU_PYTHON:-3.12}" \
        trl==1.16.0 cut-cross-entropy==25.1.1 liger-kernel==0.8.5 datasets dill multiprocess
    git rev-parse HEAD > "$folder/commit"
    echo "carry $folder"
    exit
fi

python=$(command -v python3 || command -v python)
if compgen -G "$folder/*.whl" > /dev/null; then
    site=$(mktemp -d)
    for wheel in "$folder"/*.whl; do # one by one: a peer that does not install is only that peer
        "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheel" ||
            echo "not installed: $wheel"
    done
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
[[ -f "$folder/commit" ]] && export RPO_COMMIT="${RPO_COMMIT:-$(cat "$folder/commit")}"
export PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.session --output_dir "${OUT:-benchmarks/results}" "$@"
