"""Get the CSM-1B speech model onto a machine and know that it is right."""
