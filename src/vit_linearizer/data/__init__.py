"""Pictures: where they come from, how they are read, and what is shown of them in which order."""
