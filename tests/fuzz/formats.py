"""All formats."""

from . import (
    answers,
    captions,
    configs,
    instructions,
    pictures,
    prepared,
    questions,
    runs,
    scorers,
    state,
    tower_settings,
    towers,
)

FORMATS = (
    *captions.FORMATS,
    *questions.FORMATS,
    *instructions.FORMATS,
    *pictures.FORMATS,
    *configs.FORMATS,
    *towers.FORMATS,
    *tower_settings.FORMATS,
    *state.FORMATS,
    *prepared.FORMATS,
    *scorers.FORMATS,
    *runs.FORMATS,
    *answers.FORMATS,
)
