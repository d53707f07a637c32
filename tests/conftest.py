"""What all tests share: how much Hypothesis tries."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Which profile: HYPOTHESIS_PROFILE=nightly. A failure prints its steps, and a blob that repeats it.
settings.register_profile(
    "quick", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", parent=settings.get_profile("quick"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
