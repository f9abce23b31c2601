"""The gRPC service: decode, check and charge a call; let an engine work; encode; forget.

`server` says what answers on which of the `listeners`. `interceptor` runs before every call, `bounds` and
`limits` say how much it may ask for, `servicers` and `streams` answer it, and `codec` is the only module
that turns protobuf types into ours.
"""
