"""The sealed store of the device: encryption, one SQLite file, and what is written to it."""
