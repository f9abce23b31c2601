"""What this cloud serves: one base model, its artefacts, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.interface import most_tokens
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.bounds import MessageBounds
from perfit_cloud.service.limits import Limits
from perfit_shared.errors import ConfigError, ShiftMismatch

__all__ = ["Catalog"]

_HEADER_BYTES = 64 * 1024  # of safetensors: names, shapes
_MESSAGE_OVERHEAD = 64 * 1024  # what a message holds besides the tensors: names, prompt


@dataclass(frozen=True)
class Catalog:
    base: BaseModel
    artefacts: Mapping[str, Artefact]  # by name
    limits: Limits
    cloud_id: str  # random identity of this cloud, hex

    @classmethod
    def build(
        cls, config: CloudConfig, base: BaseModel, artefacts: Sequence[Artefact], cloud_id: str
    ) -> Catalog:
        """Check that everything fits together.

        Raises ShiftMismatch for an artefact of another model, ConfigError for two of one name, for limits
        that leave no room, or for a model that cannot forget.
        """
        if base.capabilities.keeps_state and config.hardening == "on":
            raise ConfigError(
                "models of this family keep what their last pass computed on their modules, so this cloud "
                "could not forget it; serve another model, or set hardening=off if it may remember"
            )
        by_name: dict[str, Artefact] = {}
        for artefact in artefacts:
            if artefact.name in by_name:
                raise ConfigError(f'two artefacts are named "{artefact.name}"; serve one of them')
            by_name[artefact.name] = artefact
            _check_fits(artefact, base)
            # FetchSeed gives all starts in one message.
            needed = len(artefact.starts) * _tensor_bytes(artefact) + _MESSAGE_OVERHEAD
            if needed > config.message_bytes:
                raise ConfigError(
                    f'message_bytes is too small for artefact "{artefact.name}"; set it to {needed} or more'
                )
        context = most_tokens(base.context, config.cache_tokens)
        if context < 2:
            raise ConfigError("cache_tokens leaves no room for a prompt and an answer")
        limits = Limits(
            prompt_tokens=min(config.prompt_tokens, context - 1),
            new_tokens=min(config.new_tokens, context - 1),
            context=context,
            examples=config.examples,
            call_tokens=config.call_tokens,
            message_bytes=config.message_bytes,  # lowered below to what is needed
            adapt_examples=config.adapt_examples,
            adapt_tokens=config.adapt_tokens,
            questions=config.questions,
        )
        catalog = cls(base, by_name, limits, cloud_id)
        needed = MessageBounds.largest(limits, catalog.tensor_bytes)
        return replace(catalog, limits=replace(limits, message_bytes=min(config.message_bytes, needed)))

    @property
    def tensor_bytes(self) -> int:
        """Of the largest personal shift that a device may send."""
        return max(map(_tensor_bytes, self.artefacts.values()), default=0)


def _tensor_bytes(artefact: Artefact) -> int:
    """In float32, the largest form."""
    return 4 * artefact.spec.personal_parameters() + _HEADER_BYTES


def _check_fits(artefact: Artefact, base: BaseModel) -> None:
    if artefact.fingerprint != base.fingerprint:
        raise ShiftMismatch(
            f'artefact "{artefact.name}" was trained on another model (fingerprint '
            f"{artefact.fingerprint[:12]}, {base.name} has {base.fingerprint[:12]}); train it again on this "
            "one with `perfit-cloud collective train`"
        )
    if artefact.spec.hidden_size != base.hidden_size or artefact.spec.layers[-1] >= base.blocks:
        raise ShiftMismatch(f'the layers or hidden size of artefact "{artefact.name}" are not this model\'s')
