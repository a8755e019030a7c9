"""A network on its device: layer hooks, attention, replay."""
