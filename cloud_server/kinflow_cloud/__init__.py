"""The cloud server: the edge server's worker with the largest member and nothing above it."""
