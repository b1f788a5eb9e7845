"""An OpenAI-compatible endpoint in front of a TextDevice: existing apps change their URL."""
