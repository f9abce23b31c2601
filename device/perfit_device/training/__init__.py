"""Personal training: `update` plans and runs it, `gradients` fetches the numbers from the cloud.

The schedule and the optimizer are those of `perfit_shared`: research and devices take the same steps.
"""
