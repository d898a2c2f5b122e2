"""The schema's versions. Each has a fixture in tests/unit/store/fixtures that must open for ever."""
