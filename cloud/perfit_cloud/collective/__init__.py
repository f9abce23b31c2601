"""Stage 1: a collective shift and its public seed, learned from many people's examples.

`run` is the whole of it, from an operator's files to an artefact with a card; `trials` chooses the learning
rates, `privacy` adds noise by person.
"""
