#!/usr/bin/env bash
# Builds the wheel and uses it as a stranger would, in fresh environments outside the clone: the queue loss with the base
# dependencies alone, then the console command with a preset by name, in a few steps.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$PWD/.venv/bin/uv constraints=$PWD/constraints.txt python=$PWD/.venv/bin/python
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$uv" build --quiet --wheel --python "$python" --out-dir "$place" .
wheel=$(echo "$place"/*.whl)
"$uv" venv --quiet --python "$python" "$place/base"
"$uv" pip install --quiet --python "$place/base/bin/python" -c "$constraints" "$wheel"
cd "$place"
base/bin/python - <<'PYTHON'
import jax
import eim_jax

features = jax.random.normal(jax.random.key(0), (100, 16))
queue = eim_jax.Queue.of(features)
found = queue.nce(features[:4], jax.numpy.arange(4))
assert found.recall1 == 4 and found.loss > 0, found
print(f"base install: queue loss {found.loss / 4:.3f}")
PYTHON
if base/bin/eim_jax --help 2>said; then echo "the command ran without its dependencies?"; exit 1; fi
grep -q "pip install '\.\[train\]'" said

"$uv" venv --quiet --python "$python" train
"$uv" pip install --quiet --python train/bin/python -c "$constraints" "${wheel}[train]"
short=(--config.data.scenes=60 --config.data.eval_limit=40 --config.decode.max_tokens=24 --config.decode.java=False)
for stage in base st lm ie; do
  short+=("--config.stages.$stage.steps=12" "--config.stages.$stage.warmup_steps=2")
done
train/bin/eim_jax --version
train/bin/eim_jax --config=miniature --workdir=run "${short[@]}"
test -s run/report.html
echo "installed wheel: preset by name trained, report written"
