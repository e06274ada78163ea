"""Mutated input of every format that the project reads: `python -m tests.fuzz --minutes=N [--only=NAME] [--seed=S]`.

A format's valid input is made once; mutations that know its structure change it; the program's own reader is called.
Two outcomes are allowed: a result that an independent plain reading confirms, or an error as the command line shows it,
one message that names the file or the field. Anything else is kept as a folder and fails.
"""
