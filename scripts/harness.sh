#!/usr/bin/env bash
# lmms-eval as published scores a run through its own command line. Its environment lies on the project's, so that JAX,
# PyTorch and transformers are there once, and nothing of lmms-eval is in what the project installs.
set -euo pipefail
cd "$(dirname "$0")/.."

own=.venv/lmms_eval
packages() {
  "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

.venv/bin/python -m venv --without-pip "$own"
# A .pth of its own: files of that folder that continue the path, such as that of an editable install, are read as well.
echo "import site; site.addsitedir('$(packages .venv)')" > "$(packages "$own")/project.pth"
.venv/bin/uv pip install --quiet --python "$own/bin/python" --no-deps -r tests/harness/requirements.txt
exec "$own/bin/python" -m pytest -n 0 tests/harness
