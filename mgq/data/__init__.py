"""Images: read, decoded, augmented and loaded. Importing it imports nothing else."""

SYNTHETIC = "synthetic"
"""What ``data`` says for the drawn pictures, in recipes and on the command line."""
