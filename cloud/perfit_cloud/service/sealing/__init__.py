"""Calls sealed to this process: its keys (`keys`), who seals (`callers`), and their messages (`calls`).

What seals and opens is `perfit_shared.sealing`; `service/interceptor.py` has it around every sealed call.
"""
