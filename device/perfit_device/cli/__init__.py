"""The command `perfit`: it parses, asks and prints. What it does lies in the rooms beside it.

Heavy imports go inside the commands, so that `perfit --help` answers at once.
"""
