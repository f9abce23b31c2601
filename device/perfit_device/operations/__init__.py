"""What can be done with a profile, one file an operation.

Each takes an open `Profile` and gives values. None prints, prompts or knows the command line; they report
through `profile.notify` and progress callbacks. The commands of `cli` use them.
"""
