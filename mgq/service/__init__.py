"""A network that answers over HTTP."""
