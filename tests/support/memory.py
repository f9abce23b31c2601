"""Whether this machine lets a test look into the memory of another process."""

from __future__ import annotations

import pytest

from perfit_cloud.audit.memory import check_allowed
from perfit_shared.errors import ConfigError


def may_look() -> bool:
    try:
        check_allowed()
    except ConfigError:
        return False
    return True


looking = pytest.mark.skipif(not may_look(), reason="looking into other processes needs CAP_SYS_PTRACE")
