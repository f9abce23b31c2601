"""The endpoint that apps written for OpenAI's API can use, on this machine alone.

It reads requests (`schema`), has whoever holds the profile perform them (`work`), and writes what clients
expect (`chat`, `responses`). `guard` stands before all of it, and `server` binds the socket.
"""
