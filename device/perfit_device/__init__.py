"""The user's side of perfit: identity, vault, history and personal updates.

`profile` opens what one person has on this device; the commands, and whatever else serves this person, stand
on it. Nothing here imports torch: a step of training is numpy on 65,000 numbers.
"""

__version__ = (
    "0.1.0"  # as in pyproject.toml: reading that of the installed package takes longer than an answer
)
