"""Commands that train, and that report on what was trained."""
