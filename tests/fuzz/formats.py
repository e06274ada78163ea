"""All formats."""

from . import captions, configs, instructions, pictures, prepared, questions, runs, scorers, state, towers

FORMATS = (
    *captions.FORMATS,
    *questions.FORMATS,
    *instructions.FORMATS,
    *pictures.FORMATS,
    *configs.FORMATS,
    *towers.FORMATS,
    *state.FORMATS,
    *prepared.FORMATS,
    *scorers.FORMATS,
    *runs.FORMATS,
)
