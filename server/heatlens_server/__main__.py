"""`python -m heatlens_server` is `heatlens-server`."""

from heatlens_server.cli import app

app(prog_name="heatlens-server")
