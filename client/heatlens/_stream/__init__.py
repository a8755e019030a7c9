"""Streams: the window of frames, the call under a stream, and both faces."""
