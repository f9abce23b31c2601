"""The tests mirror the packages; `support` holds what they share, `e2e` runs real processes."""

import pytest

pytest.register_assert_rewrite("tests.support")  # a failure there shows its values, too
