"""What computes: engines that generate text, and gradients of personal shifts, on one device lock.

`interface` says what an engine takes, gives, promises and must forget. Tensors and token ids come in; no
module here knows grpc, a certificate or a file.
"""
