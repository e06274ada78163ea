"""Tables of kinds whose names are fields of a config: empty here, filled by the rooms that hold the kinds.

The config room stands below those rooms and cannot import them, but writes out a field for each known name.
"""

from typing import Any

LOSSES: dict[str, Any] = {}  # eim_jax.losses.table fills it; see docs/extend/losses.md
