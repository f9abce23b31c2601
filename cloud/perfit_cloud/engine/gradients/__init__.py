"""Gradients of personal shifts: cached activations, batches of several users, one scheduler."""
