"""The README names every mode and config there is; the files and links it names are there."""

import re
from pathlib import Path

from eim_jax.main import MODES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)  # comments in shell code look like headings


def test_every_mode_and_config_is_named():
    modes = [f"--mode={mode}" for mode in MODES]
    configs = [path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base")]
    assert len(configs) > 10
    assert [name for name in (*modes, *configs) if name not in TEXT] == []


def test_headings_are_unique_and_links_lead_to_them():
    headings = re.findall(r"^#+ (.+)$", PROSE, flags=re.MULTILINE)
    assert len(headings) > 15 and sorted(set(headings)) == sorted(headings)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert targets
    for target in targets:
        known = target[1:] in anchors if target.startswith("#") else "://" in target or (ROOT / target).exists()
        assert known, target


def test_named_files_exist():
    named = set(re.findall(r"`((?:eim_jax|experiments|configs|benchmarks|tests|scripts|launch)/[\w./]+\.\w+)`", TEXT))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
