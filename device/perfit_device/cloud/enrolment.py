"""Getting and renewing this device's certificate."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import grpc

from perfit_device.cloud.channels import address_of, enrolment_channel, translate
from perfit_device.cloud.identity import Enrolment, Identity, certificate_life, life_left
from perfit_shared.errors import InviteRefused, NotAuthenticated
from perfit_shared.invites import Invite
from perfit_shared.wire import enrollment_pb2 as pb
from perfit_shared.wire import enrollment_pb2_grpc as services

__all__ = ["check_expiry", "enroll", "renew", "renew_lapsed", "wants_renewal"]

_SECONDS = 30.0  # deadline of every call here
_RENEW_BELOW = 1 / 3  # of a certificate's life left


def check_expiry(invite: Invite) -> None:
    """Raises InviteRefused when the invite's time is over, before anything is sent."""
    if datetime.now(UTC).timestamp() >= invite.expires_unix:
        try:
            when = f"{datetime.fromtimestamp(invite.expires_unix, UTC):%Y-%m-%d %H:%M} UTC"
        except (OverflowError, ValueError, OSError):
            when = "an impossible date"
        raise InviteRefused(f"this invite expired on {when}; ask the operator for a new one")


def enroll(invite: Invite, identity: Identity) -> Enrolment:
    """Trade the invite for a certificate. With the same key it may be called again: replies get lost.

    Raises InviteRefused, NotAuthenticated when the server is not the invite's, or Unavailable.
    """
    check_expiry(invite)
    address_of(invite.address)
    with enrolment_channel(invite.address, invite.server_ca_der) as channel:
        credentials = _call(
            _enrollment_stub(channel).Enroll,
            pb.EnrollRequest(secret=invite.secret, csr=identity.csr()),
            invite.address,
            invite.server_ca_der,
        )
    return _checked(
        Enrolment(
            identity=identity,
            certificate=credentials.certificate,
            server_ca=credentials.server_ca,
            address=credentials.address,
            enrolment_address=invite.address,
            cloud_id=credentials.cloud_id,
        )
    )


def wants_renewal(enrolment: Enrolment) -> bool:
    """Whether less than a third of the certificate's life is left."""
    return life_left(enrolment.certificate) < _RENEW_BELOW


def renew(channel: grpc.Channel, enrolment: Enrolment) -> Enrolment:
    """A new certificate for a new key, over the mutual-TLS channel.

    Save it before its first use, from which on the cloud refuses the old one.
    """
    new = Identity.create()
    stub: Any = services.IdentityStub(channel)
    credentials = _call(stub.Renew, pb.RenewRequest(csr=new.csr()), enrolment.address, enrolment.server_ca)
    return _renewed(enrolment, new, credentials)


def renew_lapsed(enrolment: Enrolment) -> Enrolment:
    """The same after the old one has lapsed, by signing the cloud's nonce with its key.

    Raises CertificateValid when by the cloud's clock it has not.
    """
    address, server_ca = enrolment.enrolment_address, enrolment.server_ca
    new = Identity.create()
    csr = new.csr()
    with enrolment_channel(address, server_ca) as channel:
        stub = _enrollment_stub(channel)
        nonce = _call(stub.Challenge, pb.ChallengeRequest(), address, server_ca).nonce
        request = pb.RenewLapsedRequest(
            certificate=enrolment.certificate,
            nonce=nonce,
            signature=enrolment.identity.sign_renewal(nonce, csr),
            csr=csr,
        )
        credentials = _call(stub.RenewLapsed, request, address, server_ca)
    return _renewed(enrolment, new, credentials)


def _enrollment_stub(channel: grpc.Channel) -> Any:
    return services.EnrollmentStub(channel)


def _call(method: Any, request: Any, address: str, server_ca: bytes) -> Any:
    try:
        return method(request, timeout=_SECONDS)
    except grpc.RpcError as error:
        raise translate(error, address, server_ca) from error


def _renewed(enrolment: Enrolment, identity: Identity, credentials: pb.Credentials) -> Enrolment:
    if credentials.cloud_id != enrolment.cloud_id:
        raise NotAuthenticated("the cloud answered as another cloud; ask its operator for a new invite")
    return _checked(
        replace(
            enrolment,
            identity=identity,
            certificate=credentials.certificate,
            server_ca=credentials.server_ca,
            address=credentials.address,
        )
    )


def _checked(enrolment: Enrolment) -> Enrolment:
    """Raises NotAuthenticated unless the certificate is for this device's key and can be used."""
    address_of(enrolment.address)
    certificate_life(enrolment.server_ca)
    if not enrolment.identity.matches(enrolment.certificate):
        raise NotAuthenticated("the cloud sent a certificate for another key; ask for a new invite")
    if not enrolment.cloud_id or len(enrolment.cloud_id) > 128:
        raise NotAuthenticated("the cloud did not say which cloud it is; tell its operator")
    return enrolment
