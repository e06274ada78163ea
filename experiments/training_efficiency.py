"""What EIM's stages cost beside the baseline's one: seconds of an epoch, as measured in the cells."""

from experiments.layout import Table
from experiments.rows import ADAPTER, ADAPTER_EIM, BASELINE, EIM, LARGE, LAVIN, LAVIN_EIM

# Minutes of an epoch: ClipCap on one RTX-3090, the others on four A100 (there the paper gives what EIM adds).
MINUTES = {
    BASELINE.name: {"all": 23.0},
    LARGE.name: {"all": 75.0},
    EIM.name: {"st": 0.9, "lm": 6.4, "ie": 43.7, "all": 51.0},
    ADAPTER_EIM.name: {"st": 20 / 60, "lm": 1.0, "adapter": 7.0},
    LAVIN_EIM.name: {"st": 27 / 60, "lm": 1.05, "adapter": 7.0},
}
TABLE = Table(
    "efficiency",
    "Training time of an epoch",
    (BASELINE, LARGE, EIM, ADAPTER, ADAPTER_EIM, LAVIN, LAVIN_EIM),
    ("seconds",),
    about="Seconds an epoch of each stage, from its steady speed (compilation left out), beside the paper's minutes.",
)
