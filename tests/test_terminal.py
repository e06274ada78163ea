"""What a caption, a file name or an error holds is shown as text: it never steers the reader's terminal."""

import subprocess
import sys

import pytest
from rich.text import Text

from eim_jax.parallel import processes
from eim_jax.utils.console import console, print_table

EVIL = "a\x1b]0;title\x07 \x1b[31mred\r\x9bcat\x00\x7f"
SHOWN = r"a\x1b]0;title\x07 \x1b[31mred\x0d\x9bcat\x00\x7f"


def test_lines_titles_and_cells_show_control_characters():
    with console.capture() as got:
        console.print(EVIL, soft_wrap=True)
        print_table(EVIL, [EVIL, "n"], [[EVIL, 1]])
        console.print(Text("plain"))
    said = got.get()
    assert said.count(SHOWN) == 4 and not set(said) & set("\x1b\x07\r\x9b\x00\x7f")


def test_tabs_and_lines_stay():
    with console.capture() as got:
        console.print("one\ntwo", soft_wrap=True)
    assert got.get() == "one\ntwo\n"


def test_an_error_s_message_is_shown_as_text(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "eim_jax.main", "--mode=eval", f"--workdir={tmp_path}/\x1b[31m"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and r"\x1b[31m" in found.stderr and "\x1b" not in found.stderr


@pytest.mark.parametrize(
    ("coordinator", "names", "bound"),
    [
        ("127.0.0.1:1234", {}, "127.0.0.1:1234"),
        ("localhost:1234", {"localhost": "127.0.0.1"}, "127.0.0.1:1234"),
        ("host0:1234", {"host0": "127.0.1.1"}, None),  # Debian's name for the host itself: no other host gets there
        ("203.0.113.7:1234", {}, None),  # an address that this host has not got
        ("", {}, None),  # a launcher tells
    ],
)
def test_the_coordinator_listens_at_the_address_given(coordinator, names, bound, monkeypatch):
    monkeypatch.setattr(processes.socket, "gethostbyname", lambda host: names.get(host, host))
    assert processes._bind_address(coordinator) == bound
