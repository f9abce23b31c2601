"""Personal training: the update, and where its gradients come from."""
