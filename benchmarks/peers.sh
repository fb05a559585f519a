#!/bin/sh
# Make the environment of the quantizers that ours is measured beside: GPTQModel (GPTQ and AWQ) and AutoRound.
#
#     sh benchmarks/peers.sh [FOLDER]            # default build/peers; PYTHON chooses the interpreter
#
# optimum is what transformers needs besides to load GPTQ, gguf and sentencepiece what AutoRound needs to write GGUF.
# They bring a torch and a numpy of their own, so they never share one with the project. torch is pinned to the version
# the project is measured with: without the pin pip fetches a CUDA build of several GB. GPTQModel 7.6.0 is the newest
# that accepts this torch (7.7 asks for 2.14.1). No kernel is compiled: on a CPU GPTQModel computes with plain torch.
set -eu
FOLDER=${1:-build/peers}
free=$(df -Pk "$(dirname "$FOLDER")" 2>/dev/null | awk 'NR == 2 { print int($4 / 1048576) }')
if [ "${free:-9}" -lt 5 ]; then
    echo "peers: ${free} GB free beside $FOLDER, 5 are needed" >&2
    exit 6
fi
[ -x "$FOLDER/bin/python" ] || "${PYTHON:-python3}" -m venv "$FOLDER"
PIP="$FOLDER/bin/python -m pip --disable-pip-version-check"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
printf 'torch==2.13.0\n' > "$pins"
$PIP install --quiet --constraint "$pins" torch==2.13.0 'setuptools<85' wheel
$PIP install --quiet --constraint "$pins" gptqmodel==7.6.0 optimum auto-round==0.16.0 gguf sentencepiece
GPTQMODEL_CPU_WORKERS=2 "$FOLDER/bin/python" -c 'import gptqmodel, torch; print("GPTQModel", gptqmodel.__version__, "torch", torch.__version__)'
