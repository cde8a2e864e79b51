"""`python -m tools.pictures`: draw the pictures of docs/ again."""

from tools.pictures import architecture, terminal

architecture.PICTURE.write_text(architecture.draw(), encoding="utf-8")
recorded = terminal.RECORD.read_text(encoding="utf-8")
terminal.PICTURE.write_text(terminal.draw(recorded), encoding="utf-8")
