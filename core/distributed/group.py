"""Opening a rank's communicator."""

from __future__ import annotations

from ...platforms.interface import Communicator, Device, GroupSpec, Platform
from ..errors import ConfigError


def open_group(platform: Platform, device: Device, group: GroupSpec) -> Communicator:
    """The platform's communicator for this member of `group`; it returns when all members are
    there. A group of one needs no rendezvous and starts nothing."""
    if not 0 <= group.rank < group.size:
        raise ConfigError(f"Rank {group.rank} is not in a group of {group.size}.", param="rank")
    if group.size > 1 and not group.rendezvous.startswith("file://"):
        raise ConfigError(
            f"A group of {group.size} meets at a file:// URL, not {group.rendezvous!r}.",
            param="rendezvous",
        )
    return platform.communicator(group, device)
