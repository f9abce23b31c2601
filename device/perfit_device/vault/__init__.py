"""The sealed store of the device: one SQLite file of encrypted rows.

`store` opens, locks and closes it, `sealed_rows` puts, gets and deletes rows; `file` is SQLite's side of it,
`crypto` the keys and the sealing, and `checksum` tells a damaged file from a wrong passphrase. A kill at any
byte leaves the old or the new version.
"""
