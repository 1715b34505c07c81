"""Other people's libraries, each an extra of its own: what is here imports the core, and the core nothing of it."""
