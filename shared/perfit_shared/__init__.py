"""What a perfit device and a perfit cloud must agree on: shifts, tasks, errors and the wire."""

__version__ = "0.1.0"
