"""The models of a server: from a configuration to an engine that serves, and the state of each."""
