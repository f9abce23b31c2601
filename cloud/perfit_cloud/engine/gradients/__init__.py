"""Gradients of personal shifts.

`activation_cache` holds what no shift can change, `multi_user` runs the rest for several people in one pass,
`session` is one update from its first step to its last, and `scheduler` decides what runs next.
"""
