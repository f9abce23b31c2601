"""Generated from protos/ by scripts/generate_wire.py; never edited."""
