"""Settings of the whole suite: hypothesis profiles.

`HYPOTHESIS_PROFILE=thorough` draws many more, and random, examples; the default profile draws the same ones on every
run."""

from __future__ import annotations

import os
from datetime import timedelta

from hypothesis import HealthCheck, settings

# The oracle differentiates token by token: an example takes up to some seconds on a busy machine. The deadline
# catches a hang.
_shared = {"deadline": timedelta(seconds=60), "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", derandomize=True, database=None, max_examples=60, **_shared)
settings.register_profile("thorough", max_examples=400, **_shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
