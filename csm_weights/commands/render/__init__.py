"""commands/render."""
