"""Names that a file of a model can have: one table for split, weights and recombine.sh."""

from __future__ import annotations

NAMES = (
    "model.safetensors",
    "epoch=3-step=100.ckpt",
    "mistral-7b-v0.1.Q4_K_M.gguf",
    "a b  c.bin",
    " leading space.bin",
    "(1).bin",
    "a,b;c.bin",
    "#1.bin",
    "~home.bin",
    "this & that.bin",
    "it's.bin",
    "[ab].bin",
    "100%.bin",
    "$(touch x).bin",
    "`touch x`.bin",
    "-rf",
    "!x{1,2}^.bin",
    ".hidden",
    "_x",
    "UPPER.BIN",
    "\xe9t\xe9.bin",
    "e\u0301.bin",
    "\u30e2\u30c7\u30eb.bin",
    "\U0001f600.bin",
    "# x: 5 bytes, sha256.bin".replace(":", ""),
    "x" * 180 + ".bin",
)
