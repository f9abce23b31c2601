"""What tests share: helpers by subject. Fixtures are in the conftest files, and nothing here is a test."""
