"""Getting and renewing this device's certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from perfit_device.cloud.channels import addresses_of, enrolment_channel, shuffled, translate
from perfit_device.cloud.identity import Enrolment, Identity, certificate_life, life_left, pem
from perfit_device.cloud.sealed_channel import opened_channel
from perfit_device.cloud.sealing import Sealing, trusted_roots
from perfit_shared.errors import IdentityRevoked, NotAuthenticated, NotHere, SealUnknown, Unavailable
from perfit_shared.invites import Invite
from perfit_shared.wire import enrollment_pb2 as pb
from perfit_shared.wire import enrollment_pb2_grpc as services
from perfit_shared.wire import personalization_pb2
from perfit_shared.wire import personalization_pb2_grpc as personalization

__all__ = ["enroll", "leave", "renew", "renew_lapsed", "wants_renewal"]

_T = TypeVar("_T")
_SECONDS = 30.0  # deadline of every call here
_RENEW_BELOW = 1 / 3  # of a certificate's life left


def enroll(invite: Invite, identity: Identity) -> Enrolment:
    """Trade the invite for a certificate. With the same key it may be called again: replies get lost.

    Raises InviteRefused, NotAuthenticated when the server is not the invite's, or Unavailable.
    """
    invite.check_expiry()  # before anything is sent
    request = pb.EnrollRequest(secret=invite.secret, csr=identity.csr())
    roots = pem(invite.server_ca_der)

    def enroll_at(address: str) -> Any:
        with enrolment_channel(address, roots) as channel:
            return _call(_enrollment_stub(channel).Enroll, request, address, roots)

    credentials = _anywhere(invite.address, enroll_at)
    return _checked(
        Enrolment(
            identity=identity,
            certificate=credentials.certificate,
            server_ca=credentials.server_ca,
            other_server_ca=credentials.other_server_ca,
            address=credentials.address,
            enrolment_address=invite.address,
            cloud_id=credentials.cloud_id,
        )
    )


def wants_renewal(enrolment: Enrolment) -> bool:
    """Whether less than a third of the certificate's life is left."""
    return life_left(enrolment.certificate) < _RENEW_BELOW


def renew(channel: grpc.Channel, enrolment: Enrolment, address: str) -> Enrolment:
    """A new certificate for a new key, over the mutual-TLS channel to `address`.

    Save it before its first use, from which on the cloud refuses the old one. A server that issues none
    sends to where this device enrolled.
    """
    new = Identity.create()
    stub: Any = services.IdentityStub(channel)
    try:
        credentials = _call(stub.Renew, pb.RenewRequest(csr=new.csr()), address, enrolment.roots)
    except NotHere:
        return renew_lapsed(enrolment, is_not_here=True)
    return _renewed(enrolment, new, credentials)


def leave(enrolment: Enrolment, sealing: Sealing | None = None) -> None:
    """Have the cloud withdraw this identity. Where it was withdrawn before, replies get lost, that is well.

    A certificate that has lapsed is renewed first: the cloud takes no other.
    """
    if life_left(enrolment.certificate) <= 0:
        enrolment = renew_lapsed(enrolment)

    def leave_at(address: str) -> None:
        def keys(channel: grpc.Channel) -> Any:
            described: Any = personalization.PersonalizationStub(channel)
            request = personalization_pb2.DescribeRequest()
            return _call(described.Describe, request, address, roots).sealing_keys

        opened, _ = opened_channel(enrolment, address, sealing, keys)
        with opened as channel, contextlib.suppress(IdentityRevoked):
            stub: Any = services.IdentityStub(channel)
            try:
                _call(stub.Leave, pb.LeaveRequest(), address, roots)
            except SealUnknown:  # a front gave the call to another server than the one that said its keys
                _call(stub.Leave, pb.LeaveRequest(), address, roots)

    roots = trusted_roots(enrolment, sealing)
    _anywhere(enrolment.address, leave_at)


def renew_lapsed(enrolment: Enrolment, *, is_not_here: bool = False) -> Enrolment:
    """The same after the old one has lapsed, by signing the cloud's nonce with its key.

    Raises CertificateValid when by the cloud's clock it has not, unless `is_not_here`: a server of this cloud
    said that it renews none.
    """
    roots = enrolment.roots
    new = Identity.create()
    csr = new.csr()

    def renew_at(address: str) -> Any:
        with enrolment_channel(address, roots) as channel:
            stub = _enrollment_stub(channel)
            nonce = _call(stub.Challenge, pb.ChallengeRequest(), address, roots).nonce
            request = pb.RenewLapsedRequest(
                certificate=enrolment.certificate,
                nonce=nonce,
                signature=enrolment.identity.sign_renewal(nonce, csr),
                csr=csr,
                not_here=is_not_here,
            )
            return _call(stub.RenewLapsed, request, address, roots)

    return _renewed(enrolment, new, _anywhere(enrolment.enrolment_address, renew_at))


def _anywhere(addresses: str, call: Callable[[str], _T]) -> _T:
    """The call's value from one of these addresses; while one is not there, from another."""
    *others, last = shuffled(addresses)
    for address in others:
        with contextlib.suppress(Unavailable):
            return call(address)
    return call(last)


def _enrollment_stub(channel: grpc.Channel) -> Any:
    return services.EnrollmentStub(channel)


def _call(method: Any, request: Any, address: str, roots: bytes) -> Any:
    try:
        return method(request, timeout=_SECONDS)
    except grpc.RpcError as error:
        raise translate(error, address, roots) from error


def _renewed(enrolment: Enrolment, identity: Identity, credentials: pb.Credentials) -> Enrolment:
    if credentials.cloud_id != enrolment.cloud_id:
        raise NotAuthenticated("the cloud answered as another cloud; ask its operator for a new invite")
    return _checked(
        replace(
            enrolment,
            identity=identity,
            certificate=credentials.certificate,
            server_ca=credentials.server_ca,
            other_server_ca=credentials.other_server_ca,
            address=credentials.address,
        )
    )


def _checked(enrolment: Enrolment) -> Enrolment:
    """Raises NotAuthenticated unless the certificate is for this device's key and can be used."""
    addresses_of(enrolment.address)
    certificate_life(enrolment.server_ca)
    if enrolment.other_server_ca:
        certificate_life(enrolment.other_server_ca)
    if not enrolment.identity.matches(enrolment.certificate):
        raise NotAuthenticated("the cloud sent a certificate for another key; ask for a new invite")
    if not enrolment.cloud_id or len(enrolment.cloud_id) > 128:
        raise NotAuthenticated("the cloud did not say which cloud it is; tell its operator")
    return enrolment
