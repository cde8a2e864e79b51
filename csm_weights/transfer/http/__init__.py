"""transfer/http."""
