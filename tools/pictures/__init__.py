"""The pictures of the documentation, drawn from text in the repository without other programs.

`python -m tools.pictures` draws docs/architecture.svg from the layers in pyproject.toml, the
first line of each room's docstring and the list in docs/architecture.md; and docs/terminal.svg
from docs/terminal.txt, which `python -m tools.pictures.terminal` records.
"""
