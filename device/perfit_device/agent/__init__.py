"""The process that keeps a profile open, and how others talk to it.

`server` is that process, `client` performs operations at it, `codec` writes both sides' messages, `address`
says where it listens, `launch` starts it and `install` lets the system do so.
"""
