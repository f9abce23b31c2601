"""What can be done with a profile, one file an operation.

Each takes an open `Profile` and gives values. None prints, asks or knows the command line; `profile.notify`
and callbacks for progress are how they speak. The commands of `cli` stand on them.
"""
