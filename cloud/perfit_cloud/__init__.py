"""The operator's side of perfit: one frozen base model, collective shifts, and nothing kept of a call.

cli → service → engine → model; research (lamp, collective) stands on engine and model beside them.
"""
