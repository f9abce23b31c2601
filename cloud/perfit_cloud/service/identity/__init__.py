"""Who may call: invites, certificates, renewal and revocation.

`store` is the interface for everything that must be remembered, and `sqlite_store` keeps it in one file.
`authenticator` is all that a process that serves needs; only `authority` opens the keys that sign.
"""
