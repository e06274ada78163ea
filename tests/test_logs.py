"""Claims about a run's log: its file, its TensorBoard scalars and what the terminal shows."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from eim_jax.training.log import RunLog, StageInfo, Trained, console, print_stage, print_table, progress, read_metrics
from eim_jax.utils import console as terminal

STAGES = (
    StageInfo("st", {"st": 1.0}, (Trained("st/.*", 4, 300),), 1000, steps=4, epochs=1.0, batch=2),
    StageInfo(
        "ie",
        {"base": 1.0, "ie": 0.5},
        (Trained("visual/[^/]+/b", 2, 50), Trained("lm/.*", 9, 450)),
        1000,
        6,
        1.5,
        2,
    ),
)


def record(index, step, **more):
    return {"stage": STAGES[index].name, "stage_index": index, "step": step, "loss": 5.0 - step / 10, **more}


def steps(directory):
    return [(r["stage_index"], r["step"]) for r in read_metrics(directory / "metrics.jsonl")]


def scalars(directory, tag):
    """Reads TFRecord framing by hand: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found, start = [], None
    for path in sorted((directory / "tb").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log") and event.session_log.status == 1:
                start = event.step
                found = [row for row in found if row[0] < start]  # what TensorBoard does on a restart
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return found


def write(directory, pairs, resume_at=None):
    with RunLog.open(directory, STAGES, resume_at) as log:
        for index, step in pairs:
            log.write(record(index, step))


ALL = [(0, s) for s in range(4)] + [(1, s) for s in range(6)]


@pytest.mark.parametrize("cut", [(0, 0), (0, 2), (1, 0), (1, 3)])
def test_resume_leaves_each_step_once_in_order(tmp_path, cut):
    write(tmp_path, ALL)
    write(tmp_path, [pair for pair in ALL if pair >= cut], cut)
    assert steps(tmp_path) == ALL
    assert [step for step, _ in scalars(tmp_path, "loss")] == list(range(10))


def test_a_line_cut_by_a_kill_is_dropped_and_a_broken_line_elsewhere_is_an_error(tmp_path):
    write(tmp_path, ALL[:3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage_index": 0, "st')
    write(tmp_path, ALL[3:], (0, 3))
    assert steps(tmp_path) == ALL
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


def test_a_fresh_start_does_not_keep_an_older_run(tmp_path):
    write(tmp_path, ALL)
    write(tmp_path, ALL[:2])
    assert steps(tmp_path) == ALL[:2]


def test_each_record_is_on_disk_before_the_next(tmp_path):
    with RunLog.open(tmp_path, STAGES) as log:
        log.write(record(0, 0))
        assert steps(tmp_path) == [(0, 0)]


def test_array_scalars_become_numbers_and_nan_stays_valid_json(tmp_path):
    with RunLog.open(tmp_path, STAGES) as log:
        log.write(record(0, 0, a=np.float32(0.5), b=jnp.float32(2), c=float("nan")))
    line = (tmp_path / "metrics.jsonl").read_text()
    kept = json.loads(line, parse_constant=pytest.fail)
    assert (kept["a"], kept["b"], kept["c"]) == (0.5, 2.0, None)


def test_tensorboard_holds_every_scalar_at_the_cumulative_step(tmp_path):
    write(tmp_path, ALL)
    expected = [(s, 5.0 - s / 10) for s in range(4)] + [(4 + s, 5.0 - s / 10) for s in range(6)]
    np.testing.assert_allclose(scalars(tmp_path, "loss"), expected, rtol=1e-6)


def test_a_log_that_is_not_enabled_writes_nothing(tmp_path, capsys):
    with RunLog.open(tmp_path / "arm", STAGES, enabled=False) as log:
        log.start_stage(0)
        log.write(record(0, 0))
    assert not (tmp_path / "arm").exists() and capsys.readouterr().out == ""


def test_plain_output_is_one_line_a_record_with_every_figure_asked_for(tmp_path, capsys):
    shares = {"data_wait": 0.013, "device": 0.95, "host": 0.037, "padding": 0.071}
    shown = ("wait 1%", "host 4%", "device 95%", "pad 7%")
    more = {"loss/base": 1.25, "loss/ie": 6.5, "queue/ie/recall1": 0.375, "lr/prompt": 2e-5, "lr/lm": 2e-5}
    with RunLog.open(tmp_path / "eim", STAGES) as log:
        log.write(record(1, 3, **more, examples_per_second=812.4, **shares))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eim ie")]
    assert len(lines) == 2  # the record, and the end of the stage
    for part in ("3/6", "eta", "base 1.2500", "ie 6.5000", "r@1 ie 0.375", "lr 2.00e-05", "812 ex/s", *shown):
        assert part in lines[0], part
    assert "\x1b" not in lines[0]


def test_scores_and_slow_steps_have_their_place_on_the_line(tmp_path, capsys):
    scores = {"eval/nll": 1.5, "eval/nll_shuffled": 9.0, "train/accuracy/Avg": 0.25, "train/accuracy/NAT": 0.75}
    with RunLog.open(tmp_path / "eim", STAGES) as log:
        log.write(record(1, 3, **scores, examples_per_second=0.4, seconds_per_step=41.27, mfu=0.431))
        log.write(record(1, 4, examples_per_second=812.4, seconds_per_step=0.049))
    slow, fast, _ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("eim ie"))
    for part in ("eval/nll 1.5000", "train/accuracy/Avg 0.2500", "0.40 ex/s", "41.3 s/step", "mfu 43.1%"):
        assert part in slow, part
    assert "shuffled" not in slow and "NAT" not in slow
    assert "812 ex/s" in fast and "s/step" not in fast


def test_an_exception_is_told_as_an_early_stop(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), RunLog.open(tmp_path / "eim", STAGES) as log:
        log.write(record(1, 2))
        raise KeyboardInterrupt
    assert "stopped at step 2 of 6" in capsys.readouterr().out


def test_stage_table_shows_patterns_leaves_shares_and_what_is_frozen(capsys):
    print_stage(STAGES[1], 2, 2, "eim")
    out = capsys.readouterr().out
    for part in ("visual/[^/]+/b", "5.00 %", "lm/.*", "45.00 %", "11", "50.00 %", "frozen", "500", "base + 0.5 ie"):
        assert part in out, part


def test_tables_print_brackets_as_they_are(capsys):
    print_table("t [bold]", ["path", "size"], [["visual/[^/]+", 12345], ["[red]", 2]])
    out = capsys.readouterr().out
    assert "visual/[^/]+" in out and "[red]" in out and "12,345" in out and "t [bold]" in out


def test_plain_progress_prints_start_a_line_each_interval_and_end(capsys, monkeypatch):
    now = iter(range(0, 1000, 6))  # every look at the clock is six seconds later
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    with progress("caption queue", 100, "rows") as advance:
        for _ in range(4):
            advance(25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "caption queue: 100 rows"
    assert lines[1:-1] == ["  50/100 (50%), 12 s left"]
    assert lines[-1].startswith("caption queue: 100 rows in 30 s")


def test_on_a_terminal_the_stage_has_a_live_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", True)
    monkeypatch.setattr(console, "_environ", {"TERM": "xterm-256color"})
    write(tmp_path / "eim", ALL)
    with progress("features", 3) as advance:
        advance(3)
    out = capsys.readouterr().out
    assert "━" in out and "6/6" in out and "loss 4.5000" in out
