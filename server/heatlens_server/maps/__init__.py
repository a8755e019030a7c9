"""The methods as pure functions of arrays, of whatever library these are."""
