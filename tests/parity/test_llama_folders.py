"""LLaMA's folders as config.towers.lm: Meta's shards, pytorch_model.bin, a delta that is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from eim_jax.pretrained import (
    WeightsError,
    export_lm,
    fingerprint,
    load_lm,
)
from eim_jax.training import partition

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")


def shards_of(held: dict, parts: int) -> list[dict]:
    """Meta's model parallelism: rows of wq, wk, wv, w1, w3 and output are split, columns of the others."""
    columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    split = {
        key: x.chunk(parts, 1 if key.endswith(columns) else 0) if x.ndim == 2 else [x] * parts
        for key, x in held.items()
    }
    return [{key: pieces[i].clone() for key, pieces in split.items()} for i in range(parts)]


def test_metas_shards_are_joined_and_another_model_s_are_named(shared_original, tmp_path):
    whole = shared_original("llama_adapter") / "7B"
    (tmp_path / "params.json").write_bytes((whole / "params.json").read_bytes())
    held = torch.load(whole / "consolidated.00.pth", weights_only=True)
    for i, part in enumerate(shards_of(held, 2)):
        torch.save(part, tmp_path / f"consolidated.{i:02}.pth")
    expected, found = load_lm(whole), load_lm(tmp_path)
    assert found.config == expected.config
    for path, leaf in partition.flatten(expected.params).items():
        np.testing.assert_array_equal(partition.flatten(found.params)[path], leaf)
    assert fingerprint(tmp_path) != fingerprint(whole)
    part.pop("norm.weight")
    torch.save(part, tmp_path / "consolidated.01.pth")
    with pytest.raises(WeightsError, match=r"consolidated\.01\.pth has other keys"):
        load_lm(tmp_path)


def test_old_bin_files_are_read_and_a_delta_is_named(shared_original, tmp_path):
    """Hugging Face's form of the same LLaMA, as two pytorch_model bins in bfloat16 with an index (Vicuna's)."""
    lm = load_lm(shared_original("llama_adapter") / "7B")
    export_lm(tmp_path / "hf", lm)
    theirs = {
        key: torch.from_numpy(x).bfloat16() for key, x in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(theirs)
    where = {key: f"pytorch_model-{1 + (i % 2):05}-of-00002.bin" for i, key in enumerate(names)}

    def write(change):
        for file in set(where.values()):
            torch.save({key: change(theirs[key]) for key in names if where[key] == file}, tmp_path / "hf" / file)
        index = {"metadata": {}, "weight_map": where}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    write(lambda x: x)
    found = partition.flatten(load_lm(tmp_path / "hf").params)
    for path, leaf in partition.flatten(lm.params).items():
        np.testing.assert_array_equal(found[path], np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32))
    torch.manual_seed(0)
    write(lambda x: 0.004 * torch.randn_like(x))
    with pytest.raises(WeightsError, match=r"differences to another model's weights.*apply_delta"):
        load_lm(tmp_path / "hf")
