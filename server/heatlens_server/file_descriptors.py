"""How many connections the process has file descriptors for. Each takes one, beside those of models, files and logs."""

import logging
import resource

_log = logging.getLogger("heatlens")

OTHER_FILES = 256
"""What a server holds beside its connections: weights, caches, libraries, devices, event loops, sockets that listen."""


def connections_within_limit(wanted: int) -> int:
    """Raise the soft limit of file descriptors as far as connections need it, and say in the log what came of it.

    Args:
        wanted: how many connections are to be held at a time, >= 1.

    Returns:
        How many may be held: `wanted`, or what the hard limit leaves, at least 1.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < raised:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        except (OSError, ValueError) as error:
            _log.warning("the limit of open files stays at %d: it cannot be raised to %d (%s)", soft, raised, error)
        else:
            _log.info("limit of open files raised from %d to %d", soft, raised)
            soft = raised
    held = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - OTHER_FILES))
    if held < wanted:
        _log.warning(
            "at most %d connections are held, not server.max_connections = %d: the limit of open files is %d; raise "
            "its hard limit (ulimit -Hn, LimitNOFILE=) to %d",
            held,
            wanted,
            soft,
            needed,
        )
    return held
