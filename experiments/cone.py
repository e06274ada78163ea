"""The cone: EIM's LM stage with its queue's mean taken from keys and queries, and forms in which it might teach."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import (
    ALL_CENTRED,
    EIM,
    LM_CENTRED,
    LM_CENTRED_IMAGE,
    LM_DISTIL_CENTRED,
    LM_OTHERS,
    NO_LM,
)

TABLE = Table(
    "cone",
    "The cone",
    (EIM, NO_LM, LM_CENTRED, LM_CENTRED_IMAGE, LM_OTHERS, LM_DISTIL_CENTRED, ALL_CENTRED),
    CAPTIONS,
    about="Compared with EIM as its config has it: loss_LM on raw features. What has to be beaten is EIM without an LM "
    "stage, whose steps go to loss_base. The row without negatives has no LM stage either.",
)
