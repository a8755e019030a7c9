"""Streams: the window of frames, the call under a stream, and the streams for threads and for asyncio."""
