"""`kinflow bench`: the figures that the project claims, each printed by a command."""
