"""The edge server, and what it shares with the cloud server: broker, worker, status."""
