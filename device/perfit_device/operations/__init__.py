"""What can be done with a profile, one file an operation.

Each is a request that runs with an open `Profile` and gives values (`operation`). None prints, prompts or
knows the command line; they report by events. Commands, chat and the endpoint perform them at a profile or
its agent.
"""
