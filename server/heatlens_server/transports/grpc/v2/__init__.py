"""The open inference protocol (KServe, Triton) beside the server's own, on the same port. docs/v2.md."""
