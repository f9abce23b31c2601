"""The operator's side of perfit: one frozen base model, collective shifts, and nothing kept."""
