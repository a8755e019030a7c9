"""Headers of image files, read in bounded time before a decoder sees the file. Everything here reads untrusted input.

A walk goes over the parts of a file: a JPEG's segments, a PNG's chunks. It counts them, finds the size, the
orientation and what decoding will cost, and leaves out what decoders need not see: profiles, texts, previews, later
frames. No walk unpacks anything.
"""
