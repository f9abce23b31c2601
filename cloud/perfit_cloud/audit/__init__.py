"""`perfit-cloud audit`: looks from outside for what a server should have forgotten.

It plants words and numbers in calls, ends them in every way there is, and searches the server's memory, disk,
logs and metrics. Positive controls show that the search can find.
"""
