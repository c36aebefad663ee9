#!/usr/bin/env bash
# unpack.sh PIECES TARGET: unpacks what pack.py packed into TARGET, a folder for the PYTHONPATH.
# PYTHON names the Python that has torch.
set -euo pipefail
pieces=${1:?usage: unpack.sh PIECES TARGET} target=${2:?usage: unpack.sh PIECES TARGET}
python=${PYTHON:-python3}
find "$pieces" -name SHA256 -execdir sha256sum --quiet -c SHA256 \; | { ! grep .; }
mkdir -p "$target"
running=()
while read -r archive; do # xz may be missing there
  "$python" -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='data')" \
    "$archive" "$target" &
  running+=($!)
done < <(find "$pieces" -name '*.tar.xz')
for pid in "${running[@]}"; do wait "$pid"; done
# Else the first import takes far longer; a file for another Python version may not compile.
"$python" -m compileall -q -j 0 "$target" >/dev/null || true
