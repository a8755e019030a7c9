"""Which networks can be exported, and how right the result is: `make coverage-export`."""
