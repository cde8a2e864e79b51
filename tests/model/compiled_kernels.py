"""Compile every kernel as CSM-1B launches it, without a GPU; write what each one takes as JSON.

    python -m tests.model.compiled_kernels 90        # for sm_90

What is compiled is what a decoder launches on meta tensors: its sizes are nowhere written down.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from csm_weights.formats.architecture import CSM_1B, CsmConfig
from csm_weights.model import fused_decoder
from csm_weights.model.csm import Model

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launches:
    """The launches of one greedy frame after a prompt, a drawn one, and a step, on meta tensors."""

    def __init__(self, config: CsmConfig = CSM_1B) -> None:
        self.made: list[tuple[Any, tuple[Any, ...]]] = []
        fused_decoder.launch, before = self._launch, fused_decoder.launch
        try:
            with torch.device("meta"), torch.no_grad():
                model = Model(config).to(torch.bfloat16)
                tokens = torch.zeros(1, 3, config.codebooks + 1, dtype=torch.long)
                decoder = fused_decoder.FusedDecoder(model)
                decoder.start(tokens, tokens > 0, temperature=0)
                decoder.start(tokens, tokens > 0)
                self.before_step = len(self.made)
                decoder.step()
        finally:
            fused_decoder.launch = before

    def _launch(self, kernel: Any, programs: object, *arguments: Any, pdl: bool) -> None:
        assert programs, "a launch of no programs"
        self.made.append((kernel, (*arguments, pdl)))


def specialized(kernel: Any, arguments: tuple[Any, ...], pdl: bool) -> tuple[Any, Any, Any]:
    """The signature, constants and alignments that Triton compiles a launch for."""
    signature, constants, attributes = {}, {}, {}
    pairs = zip(kernel.params, (*arguments[:-1], pdl), strict=True)
    for index, (parameter, value) in enumerate(pairs):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constants, attributes


def usage(kernel: Any, specialization: tuple[Any, Any, Any], capability: int) -> dict[str, Any]:
    """Registers, bytes of stack, shared and local memory of a kernel, by cuobjdump."""
    signature, constants, attributes = specialization
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": 8, "launch_pdl": constants["PDL"]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found, text
    names = ("registers", "stack", "shared", "local")
    loads = re.findall(r"ld\.global[^;]*", made.asm["ptx"])
    wide = sum("v4.b32" in load for load in loads)
    resources = dict(zip(names, map(int, found.groups()), strict=True))
    return {"kernel": kernel.__name__, "wide_loads": wide, "loads": len(loads), **resources}


def main() -> None:
    """Compile for one architecture."""
    capability = int(sys.argv[1])
    kinds: dict[str, tuple[Any, Any]] = {}
    for kernel, arguments in Launches().made:
        one = specialized(kernel, arguments, pdl=capability >= 90)
        kinds[f"{kernel.__name__} {one}"] = kernel, one
    sys.stdout.write(json.dumps([usage(*kind, capability) for kind in kinds.values()]))


if __name__ == "__main__":
    main()
