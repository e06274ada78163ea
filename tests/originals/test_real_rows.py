"""Real ScienceQA problems and instructions, tokenised by LaVIN's rule, of which SentencePiece itself is the oracle.

The rule: prompt and answer are one string, encoded once between BOS and EOS and cut at 512 ids; as many ids as the
prompt alone has carry no label. The strings are those of test_prompts.py.
"""

import re

import numpy as np
import pytest
import sentencepiece

from eim_jax.config import Data
from eim_jax.data import rows
from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.datasets.scienceqa import load_scienceqa
from eim_jax.data.samples import NoImages, Sample, Split
from eim_jax.data.tokenize import encode_split, load_tokenizer

LENGTH = 512


def questions(shared_data):
    folder = shared_data("scienceqa_mini")
    parts = [load_scienceqa(folder, name, wording="official").split for name in ("train", "val", "test")]
    return [sample for part in parts for sample in part.samples]


def instructions(shared_data):
    folder = shared_data("instruct")
    files = [folder / "seed_tasks.jsonl", folder / "user_oriented_instructions.jsonl"]
    return load_instruct(files, None, template="lavin").split.samples


@pytest.mark.parametrize(("read", "count"), [(questions, 193), (instructions, 394)])
def test_real_rows_have_the_ids_and_labels_of_lavins_rule(shared_data, tmp_path, read, count):
    model = shared_data("tokenizers") / "tok512" / "tok512.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    own, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model)), load_tokenizer(tmp_path)
    # This model drops white space that LLaMA's keeps, as we do: such rows (7 of 200, 33 of 427) have other ids.
    pairs = [(s.instruction, s.response) for s in read(shared_data)]
    pairs = [pair for pair in pairs if not re.search("  |^ | $", "".join(pair))]
    assert len(pairs) == count
    data = rows.settled(Data(max_tokens=LENGTH - 1, cut="end"), tokenizer)
    samples = tuple(Sample(str(number), None, *pair) for number, pair in enumerate(pairs))
    split = Split("real", samples, NoImages([], [], ""))
    found = encode_split(split, tokenizer, data.max_tokens, True, **rows.row_options(data))
    for number, (prompt, answer) in enumerate(pairs):
        ids = [own.bos_id(), *own.encode(prompt + answer), own.eos_id()][:LENGTH]
        labels = np.array(ids)
        labels[: 1 + len(own.encode(prompt))] = 0
        real = found.valid[number]
        assert found.tokens[number, real].tolist() == ids[1:]
        assert np.where(found.supervised[number], found.tokens[number], 0)[real].tolist() == labels[1:].tolist()
