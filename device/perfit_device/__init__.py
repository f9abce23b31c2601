"""The user's side of perfit: identity, vault, history and personal updates. No torch."""
