"""Messages that only one server process can read, whoever ends TLS in front of it (HPKE, RFC 9180).

What seals and opens is here, and knows no grpc: `keys` (what is sealed to), `calls` (both keys of a call)
and `chunks` (its messages). `protos/perfit/v1/sealing.proto` has the layout. `perfit_device.cloud.sealing`
and `perfit_cloud.service.sealing` put them around calls.
"""
