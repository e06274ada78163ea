"""Folders of shared/ beside the checkout, which tests read in place."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def shared(kind: str, name: str) -> pathlib.Path:
    """Returns shared/KIND/NAME; where it is absent the test that asks is skipped."""
    path = SHARED / kind / name
    if not path.exists():
        pytest.skip(f"no folder shared/{kind}/{name} beside the checkout")
    return path
