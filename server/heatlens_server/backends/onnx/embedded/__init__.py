"""The embedded model: graphs that `server/embed.py` wrote, with weights that are read from their package."""
