"""Language models on a server: sessions that verify drafts, many of them in one batch."""
