"""Who may call: invites, certificates, revocations, and the store that remembers them."""
