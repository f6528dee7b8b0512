"""How long the tests that draw examples look for one that fails."""

from hypothesis import settings

# Tests that name no number of their own scale with it: fifty times the default.
settings.register_profile("campaign", max_examples=50 * settings.default.max_examples, deadline=None)
