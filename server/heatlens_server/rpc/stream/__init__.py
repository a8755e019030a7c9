"""StreamExplain: one session per stream, from its configuration to its last answer."""
