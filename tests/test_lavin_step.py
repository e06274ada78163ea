"""LaVIN's step as measured: full-size counts from shapes, its arithmetic against XLA's, a tiny form end to end."""

import dataclasses
import json
import pathlib
import sys

import jax
import pytest

from eim_jax.utils.flops import work

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))
try:
    import lavin_case
    import lavin_step
    import step_case
finally:
    sys.path.pop(0)

TINY = lavin_case.SIZES["tiny"]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_7b_case_has_lavins_counts_and_512_slots(quant):
    case = lavin_case.lavin_case(lavin_case.SIZES["7b"], "ie", quant=quant, batch=32, accumulate=1)
    trained, _, frozen, batch = case.arguments[:4]
    assert sum(leaf.size for leaf in trained.values()) == 3_781_296  # the published count
    assert {str(leaf.dtype) for leaf in trained.values()} == {"float32"}
    assert batch.tokens.shape[1] + 1 + 3 + 50 == 512  # with an image; "Image: N/A" takes 5 of the 53
    held = sum(leaf.size * leaf.dtype.itemsize for path, leaf in frozen.items() if path.startswith("lm/"))
    linear, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert linear + rest == 6_738_415_616
    bits = {"none": 16, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}[quant]
    assert held == pytest.approx(linear * bits / 8 + 2 * rest, rel=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_counted_arithmetic_is_that_of_xlas_unrolled_program(remat):
    chosen = {"quant": "none", "batch": 2, "accumulate": 1, "dtype": "float32"}
    size = TINY._replace(lm=dataclasses.replace(TINY.lm, vocab=512))  # else the head hides the blocks
    case = lavin_case.lavin_case(size, "adapter", **chosen, remat=remat, scan=False)  # a scan's body would count once
    counted = case.step.lower(*case.arguments).compile().cost_analysis()["flops"]
    # Adapters, norms and softmax are left out: a few per cent at this width.
    assert sum(lavin_case.flops(case, TINY.length).values()) == pytest.approx(counted, rel=0.03)


def test_compiled_table_accounts_for_every_argument(tmp_path, capsys):
    options = ["--compile", "--size", "tiny", "--stage", "ie", "--batch", "2", "--quant", "none", "--dtype", "float32"]
    (row,) = lavin_step.main([*options, "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    case = lavin_case.lavin_case(TINY, "ie", quant="none", batch=2, accumulate=1, dtype="float32")
    # Images are seen and K_t is read: of the arguments only CLIP.text lies idle.
    idle = step_case.nbytes({path: leaf for path, leaf in case.arguments[2].items() if path.startswith("text/")})
    assert row["not_read"] == pytest.approx(idle, abs=4096)
    assert row["peak"] == row["arguments"] + row["temporaries"] + row["outputs"] - row["aliased"]
    assert row["aliased"] >= step_case.nbytes(case.arguments[0])  # the trained leaves are donated
    assert "| ie | none | 2 | 1 |" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_tiny_run_measures_itself(tmp_path):
    options = ["--run", "--size", "tiny", "--batch", "2", "--accumulate", "2", "--quant", "nf4", "--steps", "2"]
    (record,) = lavin_step.main([*options, "--dtype", "float32", "--json", str(tmp_path / "run.json")])
    assert json.loads((tmp_path / "run.json").read_text()) == [record]
    assert len(record["step_seconds_all"]) == 2 and record["step_seconds"] > 0
    assert record["tokens_per_s"] == pytest.approx(2 * 128 / record["step_seconds"])
    needed = record["flops"]["forward"] + record["flops"]["backward"]
    share = needed / record["step_seconds"] / record["matmul_flops_per_s"]
    assert record["model_share_of_matmul"] == pytest.approx(share)
    assert 9.5 < record["losses"][0] < 11.5  # near log 32000: random weights know nothing
    assert record["device"] == jax.devices()[0].device_kind


def test_settings_that_cannot_be_measured_are_refused(capsys):
    for options, word in (
        (["--run", "--quant", "none", "nf4"], "one setting"),
        (["--compile", "--batch", "6", "--accumulate", "4"], "does not divide"),
    ):
        with pytest.raises(SystemExit):
            lavin_step.main(options)
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["adapter", "ie"])
def test_counted_arithmetic_is_that_of_the_traced_program_at_7b(stage):
    """`plan` counts the scanned program's products from shapes; the formula knows nothing of the program.

    The head's loop runs as often as the batch's supervised tokens say: counted once, it is a hundredth too little.
    """
    case = lavin_case.lavin_case(lavin_case.SIZES["7b"], stage, quant="none", batch=32, accumulate=2)
    traced = work(case.step.trace(*case.arguments).jaxpr)
    assert traced.unknown == 1
    assert sum(lavin_case.flops(case, 512).values()) == pytest.approx(traced.flops, rel=0.02)
