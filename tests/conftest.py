"""What all test files share."""

from hypothesis import settings

# The same examples on every run: a failure in CI is a failure on every desk.
settings.register_profile("book", derandomize=True, deadline=None)
settings.load_profile("book")
