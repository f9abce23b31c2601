"""The cloud as the device sees it.

`client` makes the `calls` over `channels`, `codec` is the only module that knows protobuf types, `enrolment`
and `identity` get and renew the certificate, and `retry` says which failures are worth another try.
"""
