"""`python -m tools.pictures`: draw docs/architecture.svg again."""

from tools.pictures import architecture

architecture.PICTURE.write_text(architecture.draw(), encoding="utf-8")
